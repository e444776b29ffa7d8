"""A network as an ordered list of stages: a view on the user's own model, not a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain as one_after_another
from operator import is_

import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.functional import evaluation_mode
from beyondprop.nn.recurrent import Recurrent
from beyondprop.stages.affine import RESHAPES, AffineStage
from beyondprop.stages.block import BlockStage
from beyondprop.stages.pipeline import PipelineStage
from beyondprop.stages.recurrent import RecurrentStage
from beyondprop.stages.stage import NORMS, Pullback, Stage

Cuts = str | Sequence[str] | Sequence[nn.Module]
"""Where stages end: `"linear"`, `"block"`, the names of the modules that end a stage, or the blocks themselves."""

_AFFINE = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)

Named = tuple[str, nn.Module]


@dataclass(slots=True)
class Trace:
    """One forward pass: a pullback for every stage from the lowest that trains upwards.

    Attributes:
        pullbacks: by stage index; None below `lowest`.
        lowest: index of the first stage with a trainable parameter.
        output: output of the last stage.
    """

    pullbacks: list[Pullback | None]
    lowest: int
    output: Tensor

    def __getitem__(self, index: int) -> Pullback:
        pullback = self.pullbacks[index]
        if pullback is None:
            raise IndexError(
                f"Stage {index} was taken already, or lies below the lowest stage that trains: {self.lowest}."
            )
        return pullback

    def take(self, index: int) -> Pullback:
        """Return a stage's pullback and let go of it, so that its memory is free as soon as its user is done."""
        pullback = self[index]
        self.pullbacks[index] = None
        return pullback

    @property
    def is_closed_form(self) -> bool:
        """Whether every recorded stage has closed forms."""
        return all(p is not None and p.is_closed_form for p in self.pullbacks[self.lowest :])


class Structure:
    """Which modules and parameters a model has, so that a change is noticed: what was built for it would train a ghost.

    Args:
        model: the model.
        blocks: modules that need not be in it.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
        own = set(model.modules())
        self._roots = {"": model, **{f"cuts[{i}]": m for i, m in enumerate(blocks) if m not in own}}
        self._named = self._names()
        self.modules = list(dict.fromkeys(m for m in self._named.values() if isinstance(m, nn.Module)))
        # What is compiled has no dictionaries of its own, what is sharded swaps its parameters in every pass.
        plain = [m for m in self.modules if not isinstance(m, torch.jit.ScriptModule)]
        whole = [m for m in plain if not any(hasattr(p, "placements") for p in m._parameters.values())]
        self._places = [*(m._modules for m in plain), *(m._parameters for m in whole)]
        self._seen = list(self._now())

    @property
    def is_same(self) -> bool:
        """Whether no module or parameter was exchanged, added or taken out."""
        now = list(self._now())
        return len(now) == len(self._seen) and all(map(is_, now, self._seen))

    def check(self) -> None:
        """Raise `UnsupportedModelError` where the model is not the same, naming what is not."""
        if self.is_same:
            return
        then, names = self._named, self._names()
        changed = [n for n in (*names, *then) if names.get(n) is not then.get(n)]
        name = min(changed, key=lambda n: isinstance(then.get(n, names.get(n)), nn.Parameter), default="")
        what = "exchanged" if name in names and name in then else "added" if name in names else "taken out"
        kind, how = "Module", "the rule would train what the model no longer has"
        if isinstance(then.get(name, names.get(name)), nn.Parameter):
            kind, how = "Parameter", "by pruning, a parametrization, load_state_dict(assign=True) or an assignment"
        raise UnsupportedModelError(
            f"{kind} {name!r} of this {type(self._roots['']).__name__} was {what} after the rule was built ({how}); build the "
            "rule anew."
        )

    def _now(self) -> Iterable[object]:
        return one_after_another.from_iterable(map(dict.values, self._places))  # in C alone: it is asked at every step

    def _names(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for prefix, root in self._roots.items():
            found |= root.named_modules(prefix=prefix, remove_duplicate=False)
            found |= root.named_parameters(prefix=prefix, remove_duplicate=False)
        return found


class Chain:
    """An ordered list of stages cut from a model.

    `"linear"` (the default) cuts a nested `nn.Sequential` so that every stage is: modules without parameters, then one
    Linear or Conv with the normalisation that follows it. Any other module with parameters (residual block, attention
    block) is a stage of its own, together with the modules without parameters before it. Modules after the last weights
    belong to the last stage.

    Args:
        model: `nn.Sequential`, nested as you like; any module where `cuts` names the blocks.
        cuts: `"linear"`; `"block"`: every child of the outermost Sequential that has parameters ends a stage; a list of
            dotted module names, each ending a stage; or a list of modules whose composition is the model's forward pass.

    Raises:
        UnsupportedModelError: if the model cannot be cut, has fewer than two stages, ties a parameter across stages, or
            overwrites a code in place. The message names the module and the way out.

    Example:
        >>> Chain(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        Chain(
          0: AffineStage('1': Flatten -> Linear)
          1: AffineStage('3': ReLU -> Linear)
        )
    """

    def __init__(self, model: nn.Module, cuts: Cuts = "linear") -> None:
        self.model = model
        self.stages: list[Stage] = [_stage(run) for run in _cut(model, cuts)]
        self._is_composition_of_model = isinstance(cuts, str) or all(isinstance(c, str) for c in cuts)
        self._check()
        self.structure = Structure(model, [m for stage in self.stages for m in stage.modules])
        # Nobody calls the model, its Sequentials that were taken apart, and the modules of closed forms: what is put on one
        # later would be passed over in silence.
        called = {m for s in self.stages if isinstance(s, BlockStage) for part in s.modules for m in part.modules()}
        passed = [m for m in self.structure.modules if m not in called]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(m, kind) for m in passed for kind in kinds]
        self._hooked = sum(map(len, self._hooks))

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]

    def __repr__(self) -> str:
        lines = "".join(f"  {i}: {stage!r}\n" for i, stage in enumerate(self.stages))
        return f"Chain(\n{lines})"

    @torch.no_grad()
    def record(self, x: Tensor, *, push: bool = False, keep_codes: bool = True) -> Trace:
        """Run all stages on `x` `(N, ...)`, each on the detached output of the one below.

        Args:
            x: the batch.
            push: whether tangents will be pushed through the stages.
            keep_codes: keep every pullback's `input` and `output`; False frees what differentiation does not need.
        """
        lowest = next((i for i, stage in enumerate(self.stages) if stage.is_trainable), len(self.stages))
        if not self._is_composition_of_model:
            self._check_composition(x)
        self.check_unchanged()
        pullbacks: list[Pullback | None] = []
        z = x
        for index, stage in enumerate(self.stages):
            if index < lowest:
                pullbacks.append(None)
                z = stage.run(z) if isinstance(stage, BlockStage) else stage.forward(z)
            else:
                pullback = stage.record(z, push=push)
                z = pullback.output
                if not keep_codes:
                    pullback.forget("input")
                    if index + 1 < len(self.stages):
                        pullback.forget("output")
                pullbacks.append(pullback)
        return Trace(pullbacks, lowest, z)

    def check_unchanged(self) -> None:
        """Raise `UnsupportedModelError` where the model is another, or a module that nobody calls got a hook."""
        self.structure.check()
        if sum(map(len, self._hooks)) > self._hooked:
            raise UnsupportedModelError(
                f"A module of this {type(self.model).__name__} got a hook after the rule was built, which closed forms would "
                "pass over; build the rule anew."
            )

    def _check(self) -> None:
        if len(self.stages) < 2:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has {len(self.stages)} stage(s) with weights; 2 or more are needed for a code "
                "between them. Add a hidden layer, or use Backprop."
            )
        owner: dict[nn.Parameter, str] = {}
        for stage in self.stages:
            for p in stage.parameters:
                if isinstance(p, nn.parameter.UninitializedParameter):
                    raise UnsupportedModelError(
                        f"Stage {stage.name!r} has lazy parameters; run one batch through the model before it is cut."
                    )
                if p in owner:
                    raise UnsupportedModelError(
                        f"Stages {owner[p]!r} and {stage.name!r} share a parameter. A chain takes every parameter in one "
                        "stage only: join the two in one block (cuts='block' or a list of blocks), or untie them."
                    )
                owner[p] = stage.name
        for p_name, p in self.model.named_parameters():
            if p not in owner:
                raise UnsupportedModelError(
                    f"Parameter {p_name!r} of {type(self.model).__name__} is in none of the blocks given as cuts; every "
                    "parameter must be."
                )
        for stage in self.stages:
            for name, module in zip(stage.names, stage.modules, strict=True):
                if getattr(module, "inplace", False):
                    raise UnsupportedModelError(
                        f"{type(module).__name__}(inplace=True) at {name!r}, head of stage {stage.name!r}, overwrites the "
                        "code of the stage below; use inplace=False."
                    )
                if not isinstance(module, RESHAPES):
                    break

    def _check_composition(self, x: Tensor) -> None:
        with evaluation_mode(self.model):
            expected, z = self.model(x), x
            for stage in self.stages:
                z = stage.forward(z)
        same = isinstance(expected, Tensor) and expected.shape == z.shape
        if not (same and torch.allclose(expected, z, equal_nan=True)):
            raise UnsupportedModelError(
                f"The blocks given as cuts, applied one after the other, do not compute what {type(self.model).__name__} "
                "computes. Give the blocks in the order of its forward pass, with every operation between them in a block."
            )
        self._is_composition_of_model = True


def _stage(run: list[Named]) -> Stage:
    carrier = next((name for name, m in reversed(run) if isinstance(m, (*_AFFINE, Recurrent))), None)
    name = carrier or next(n for n, m in reversed(run) if any(True for _ in m.parameters()))
    modules = [m for _, m in run]
    for kind in (AffineStage, PipelineStage, RecurrentStage):
        if kind.fits(modules):
            return kind(name, run)
    if not any(type(part) is Recurrent for m in modules for part in m.modules()):
        return BlockStage(name, run)
    unfolded = [part for n, m in run for part in _unfold(n, m)]
    if RecurrentStage.fits([m for _, m in unfolded]):
        return RecurrentStage(name, unfolded)
    warnings.warn(
        f"Stage {name!r} is differentiated as a whole: its Recurrent has no codes for its time steps, which it has where it is "
        "the only one of its stage, without hooks, and where all modules beside it have closed forms.",
        stacklevel=4,
    )
    return BlockStage(name, run)


def _unfold(name: str, module: nn.Module) -> list[Named]:
    """Return what a plain Sequential applies, or the module itself."""
    if not _is_plain_sequential(module):
        return [(name, module)]
    return [part for n, m in _children(module) for part in _unfold(f"{name}.{n}", m)]


def _children(module: nn.Module) -> list[Named]:
    """Return a module's children with their names; not `named_children`, which hides repetitions."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _cut(model: nn.Module, cuts: Cuts) -> list[list[Named]]:
    if isinstance(cuts, str):
        if cuts not in ("linear", "block"):
            raise ValueError(f"cuts must be 'linear', 'block', a list of names or a list of modules, got {cuts!r}.")
        return _runs(flatten(model, deep=cuts == "linear"), one_affine=cuts == "linear")
    if not cuts:
        raise ValueError("cuts is an empty list; name the modules that end a stage, or give the blocks.")
    if all(isinstance(c, nn.Module) for c in cuts):
        names = {m: n for n, m in model.named_modules()}
        blocks = [(names.get(c, f"cuts[{i}]"), c) for i, c in enumerate(cuts) if isinstance(c, nn.Module)]
        return _runs(blocks, one_affine=False)
    if all(isinstance(c, str) for c in cuts):
        return _named_runs(flatten(model, deep=True), [str(c) for c in cuts])
    raise TypeError("cuts must be a list of names or a list of modules, not a mixture.")


def flatten(model: nn.Module, *, deep: bool) -> list[Named]:
    """Return the modules of an `nn.Sequential` in order, with their dotted names, as a chain cuts them.

    Args:
        model: the Sequential.
        deep: whether Sequentials inside it are taken apart, too; those with hooks or a forward pass of their own never are.

    Raises:
        UnsupportedModelError: if `model` is none, or has hooks or a forward pass of its own.
    """
    if not _is_plain_sequential(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a forward pass of its own and cannot be cut. Pass an nn.Sequential (its blocks may "
            "be any modules), or cuts=[block, block, ...] with the modules that make up its forward pass."
        )
    children = _children(model)
    return [part for name, child in children for part in _unfold(name, child)] if deep else children


def _is_plain_sequential(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _runs(modules: list[Named], *, one_affine: bool) -> list[list[Named]]:
    """Group modules into runs that each end with weights; a norm right after an affine map joins its run."""
    runs: list[list[Named]] = []
    pending: list[Named] = []
    for name, module in modules:
        if isinstance(module, _CONTAINERS):
            raise UnsupportedModelError(
                f"{type(module).__name__} at {name!r} has no forward pass; put its modules into the Sequential themselves."
            )
        has_weights, is_norm = any(True for _ in module.parameters()), isinstance(module, NORMS)
        may_join = one_affine and runs and not pending and (not has_weights or isinstance(runs[-1][-1][1], _AFFINE))
        if is_norm and may_join:
            runs[-1].append((name, module))
        elif is_norm or not has_weights:
            pending.append((name, module))
        else:
            runs.append([*pending, (name, module)])
            pending = []
    if pending and runs:
        runs[-1] += pending
    return runs


def _named_runs(modules: list[Named], ends: list[str]) -> list[list[Named]]:
    known = [name for name, _ in modules]
    unknown = [name for name in ends if name not in known]
    if unknown:
        raise ValueError(f"cuts names {unknown[0]!r}, which is none of the model's modules: {', '.join(known)}.")
    runs: list[list[Named]] = [[]]
    for name, module in modules:
        runs[-1].append((name, module))
        if name in ends:
            runs.append([])
    tail = runs.pop()
    if any(True for _, m in tail for _ in m.parameters()):
        runs.append(tail)
    elif runs:
        runs[-1] += tail
    for run in runs:
        if not any(True for _, m in run for _ in m.parameters()):
            raise UnsupportedModelError(f"The stage that ends with {run[-1][0]!r} has no weights; drop it from cuts.")
    return runs
