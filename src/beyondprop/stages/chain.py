"""A network as an ordered list of stages: a view on the user's own model, not a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.functional import evaluation_mode
from beyondprop.nn.recurrent import Recurrent
from beyondprop.nn.reversible import Recomputed, ReversibleSequential
from beyondprop.nn.reversible.couplings import Coupling
from beyondprop.nn.structure import Structure, standing_in
from beyondprop.stages.affine import RESHAPES, AffineStage
from beyondprop.stages.block import BlockStage
from beyondprop.stages.pipeline import PipelineStage
from beyondprop.stages.recurrent import RecurrentStage
from beyondprop.stages.reversible import ReversiblePullback, ReversibleStage, know_chains
from beyondprop.stages.stage import NORMS, Pullback, Stage
from beyondprop.stages.tracing import traced

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


class Chain:
    """An ordered list of stages cut from a model.

    `"linear"` (the default) cuts a nested `nn.Sequential` so that every stage is: modules without parameters, then one
    Linear or Conv with the normalisation that follows it. Any other module with parameters (residual block, attention
    block) is a stage of its own, together with the modules without parameters before it. Modules after the last weights
    belong to the last stage. A model with a forward pass of its own is traced: functions such as `F.relu` count as their
    modules, and where it branches and joins, what lies between is one block.

    Args:
        model: `nn.Sequential`, nested as you like; a module whose forward pass is a chain of its modules; any module where
            `cuts` gives the blocks.
        cuts: `"linear"`; `"block"`: every child of the outermost Sequential that has parameters ends a stage; a list of
            dotted module names, each ending a stage; or a list of modules whose composition is the model's forward pass.
        least: how many stages there must be, >= 1.

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

    def __init__(self, model: nn.Module, cuts: Cuts = "linear", *, least: int = 2) -> None:
        self.model = model
        runs, self._followers = _cut(model, cuts)
        self.stages: list[Stage] = [_stage(run) for run in runs]
        know_chains(self.stages, model)
        self._is_composition_of_model = _is_plain_sequential(model) and (
            isinstance(cuts, str) or all(isinstance(c, str) for c in cuts)
        )
        self._check(least)
        self.structure = Structure(model, [m for stage in self.stages for m in stage.modules])
        # Nobody calls the model, its Sequentials that were taken apart, and the modules of closed forms: what is put on one
        # later would be passed over in silence.
        called = {m for s in self.stages if isinstance(s, BlockStage) for part in s.modules for m in part.modules()}
        passed = [m for m in self.structure.modules if m not in called]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(m, kind) for m in passed for kind in kinds]
        self._hooked = sum(map(len, self._hooks))
        self._passed = [vars(m) for m in passed]
        self._patched = sum("forward" in own for own in self._passed)

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
        lowest = self.lowest
        self.check(x)
        pullbacks: list[Pullback | None] = []
        z = x
        for index, stage in enumerate(self.stages):
            if index < lowest:
                pullbacks.append(None)
                z = passed(stage, z)
            else:
                pullback = stage.record(z, push=push)
                if isinstance(pullback, ReversiblePullback) and pullbacks:
                    pullback.follow(pullbacks[-1])
                z = pullback.output
                if not keep_codes:
                    pullback.forget("input")
                    if index + 1 < len(self.stages):
                        pullback.forget("output")
                pullbacks.append(pullback)
        return Trace(pullbacks, lowest, z)

    @property
    def lowest(self) -> int:
        """Index of the first stage with a trainable parameter."""
        return next((i for i, stage in enumerate(self.stages) if stage.is_trainable), len(self.stages))

    def check(self, x: Tensor) -> None:
        """Raise `UnsupportedModelError` where the stages are not the model that runs on `x` `(N, ...)`."""
        self.check_unchanged()
        if not self._is_composition_of_model:
            self._check_composition(x)

    def check_unchanged(self) -> None:
        """Raise `UnsupportedModelError` where the model is another, or a module that nobody calls got a hook.

        Functions that ask for the model's mode get it as it is now.
        """
        for module in self._followers:
            module.training = self.model.training
        self.structure.check()
        if sum("forward" in own for own in self._passed) > self._patched:
            raise UnsupportedModelError(
                f"A module of this {type(self.model).__name__} got another forward pass after the rule was built, which closed "
                "forms would pass over; build the rule anew."
            )
        if sum(map(len, self._hooks)) > self._hooked:
            raise UnsupportedModelError(
                f"A module of this {type(self.model).__name__} got a hook after the rule was built, which closed forms would "
                "pass over; build the rule anew."
            )

    def _check(self, least: int) -> None:
        if len(self.stages) < least:
            block = next((s for s in self.stages if any(isinstance(m, GraphModule) for m in s.modules)), None)
            where = "" if block is None else f" It branches around {block.name!r}, which is one block for that."
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has {len(self.stages)} stage(s) with weights; {least} or more are needed for a "
                f"code between them.{where} Add a hidden layer, or use Backprop."
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

    @torch.no_grad()  # a checkpoint around the first batch would miss what autograd saves here in its second run
    def _check_composition(self, x: Tensor) -> None:
        with evaluation_mode(self.model, *self._followers), standing_in(self.model):
            expected, z = self.model(x), x
            for stage in self.stages:
                z = stage.forward(z)
        same = isinstance(expected, Tensor) and expected.shape == z.shape
        if not (same and torch.allclose(expected, z, equal_nan=True)):
            raise UnsupportedModelError(
                f"The blocks given as cuts or found, applied one after the other, do not compute what "
                f"{type(self.model).__name__} computes. Give the blocks in the order of its forward pass, with every operation "
                "between them in a block."
            )
        self._is_composition_of_model = True


def passed(stage: Stage, z: Tensor) -> Tensor:
    """Return the output of a stage that nobody differentiates."""
    return stage.run(z) if isinstance(stage, BlockStage) else stage.forward(z)


def _stage(run: list[Named]) -> Stage:
    carrier = next((name for name, m in reversed(run) if isinstance(m, (*_AFFINE, Recurrent))), None)
    name = carrier or next(n for n, m in reversed(run) if any(True for _ in m.parameters()))
    modules = [m for _, m in run]
    # What has a forward pass of its own is called, and never taken apart.
    is_called = any("forward" in vars(part) for m in modules for part in m.modules())
    for kind in () if is_called else (AffineStage, PipelineStage, ReversibleStage, RecurrentStage):
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
    if not _is_taken_apart(module):
        return [(name, module)]
    return [part for n, m in _children(module) for part in _unfold(f"{name}.{n}" if name else n, m)]


def _children(module: nn.Module) -> list[Named]:
    """Return a module's children with their names; not `named_children`, which hides repetitions."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _cut(model: nn.Module, cuts: Cuts) -> tuple[list[list[Named]], list[nn.Module]]:
    """Return the stages' modules, and those among them that follow the model's mode."""
    if isinstance(cuts, str):
        if cuts not in ("linear", "block"):
            raise ValueError(f"cuts must be 'linear', 'block', a list of names or a list of modules, got {cuts!r}.")
        modules, followers = _opened(model, deep=cuts == "linear")
        return _runs(modules, one_affine=cuts == "linear"), followers
    if not cuts:
        raise ValueError("cuts is an empty list; name the modules that end a stage, or give the blocks.")
    if all(isinstance(c, nn.Module) for c in cuts):
        names = {m: n for n, m in model.named_modules()}
        blocks = [(names.get(c, f"cuts[{i}]"), c) for i, c in enumerate(cuts) if isinstance(c, nn.Module)]
        return _runs(blocks, one_affine=False), []
    if all(isinstance(c, str) for c in cuts):
        modules, followers = _opened(model, deep=True)
        return _named_runs(modules, [str(c) for c in cuts]), followers
    raise TypeError("cuts must be a list of names or a list of modules, not a mixture.")


def flatten(model: nn.Module, *, deep: bool) -> list[Named]:
    """Return the modules that a model applies one after the other, with their dotted names, as a chain cuts them.

    Args:
        model: an `nn.Sequential`, or a model whose forward pass is a chain of its modules.
        deep: whether Sequentials inside it are taken apart, too; those with hooks or a forward pass of their own never are.

    Raises:
        UnsupportedModelError: if the forward pass cannot be traced, or the model has hooks.
    """
    return _opened(model, deep=deep)[0]


def _opened(model: nn.Module, *, deep: bool) -> tuple[list[Named], list[nn.Module]]:
    if not _is_plain_sequential(model):
        if model._forward_hooks or model._forward_pre_hooks:
            raise UnsupportedModelError(
                f"{type(model).__name__} has hooks and cannot be cut, as nobody would call it. Put them on a module inside, or "
                "pass cuts=[block, block, ...] with the modules that make up its forward pass."
            )
        if deep and _is_taken_apart(model):
            return _unfold("", model), []
        modules, followers = traced(model, lambda module: deep and _is_plain_sequential(module))
        return ([part for name, m in modules for part in _unfold(name, m)] if deep else modules), followers
    children = _children(model)
    return ([part for name, child in children for part in _unfold(name, child)] if deep else children), []


def _is_plain_sequential(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _is_taken_apart(module: nn.Module) -> bool:
    """Whether stages may take the place of a module, as nobody watches it and they compute what it does."""
    if _is_plain_sequential(module):
        return True
    if type(module) is ReversibleSequential:
        # By themselves couplings round to no grid, and each has its own split_dim.
        fits = module.exact_bits is None and all(block.split_dim == module.split_dim for block in module)
    else:
        fits = type(module) is Recomputed
    return fits and "forward" not in vars(module) and not (module._forward_hooks or module._forward_pre_hooks)


def _runs(modules: list[Named], *, one_affine: bool) -> list[list[Named]]:
    """Group modules into runs that each end with weights; a norm right after an affine map joins its run.

    What has no weights goes to the run above it, but below a coupling, which is a run by itself.
    """
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
            if runs and isinstance(module, Coupling):  # by itself it can be undone
                runs[-1] += pending
                pending = []
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
