"""LocoProp: after an ordinary backward pass, every layer solves a small local problem instead of taking one gradient step.

Amid, Anil & Warmuth, "LocoProp: Enhancing BackProp via Local Loss Optimization", AISTATS 2022, arXiv 2106.06199. In the
paper's symbols: weights W, inputs x, pre-activations z = W x, transfer function f = F', `target_lr` gamma, local steps T.

    targets   a = z - gamma dL/dz  (squared, LocoProp-S),    y = f(z) - gamma dL/dz  (matching, LocoProp-M)
    weights   T steps of a local optimizer from V = W on     sum_n |V x_n - a_n|^2 / 2   or   sum_n D_F(V x_n, f^-1(y_n))

The first local gradient is gamma times the gradient of backpropagation, so one local step is backpropagation.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.errors import UnsupportedModelError
from beyondprop.optim import _graph, matching
from beyondprop.optim._capture import Capture
from beyondprop.optim._local import LOSSES, Buffers, LocalProblem, bound, keep_finite, whole_precision
from beyondprop.optim._units import Unit, left_over
from beyondprop.optim.factories import OptimizerFactory
from beyondprop.optim.matching import Transfer
from beyondprop.optim.rmsprop import RMSProp

LocalOptimizer = Callable[..., torch.optim.Optimizer]
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, steps: max(1 - step / steps, 0.25),
    "constant": lambda step, steps: 1.0,
}
SETTINGS = ("lr", "target_lr", "local_steps", "loss")


class LocoProp(torch.optim.Optimizer):
    """Drop-in optimizer: local loss optimization in every Linear, Conv, Embedding and registered layer of any module graph.

    The loop is the usual one: `zero_grad()`, `loss.backward()`, `step()`. Hooks keep each layer's inputs, and outputs where
    the loss needs them, from the backward pass until `step`. Parameters of other kinds (norms, free ones, attention's packed
    projections, whatever `exclude` names) take ordinary steps of `base`.

    Every layer has a parameter group of its own with the keys `name`, `lr`, `target_lr`, `local_steps` and `loss`, besides
    those of the local optimizer; the groups of `base` come last. Learning-rate schedulers see them all.

    Args:
        model: any module; with `DistributedDataParallel`, the wrapper itself: corrections are then summed over its ranks.
        lr: step size of the local optimizer.
        target_lr: gamma: how far targets are moved against the gradient of the loss as it was reduced; with a mean over
            N samples each target moves by gamma / N of its sample's gradient.
        local_steps: T >= 1, the first of which is a step of backpropagation.
        loss: `"matching"` (LocoProp-M), `"squared"` (LocoProp-S), or `"quadratic"`: the matching loss with each unit's slope
            averaged over the batch, which costs what the squared one does.
        rows: samples that each local step after the first looks at: a share in (0, 1] of the batch, or their number.
            Blocks of the batch take turns, so it should be shuffled; X^T X comes from the first. Default: all. They are counted
            along the first dimension of a layer's input: in sequence-first nets, over time steps.
        gram: corrections of the squared loss by X^T X, whose cost does not depend on the batch size: True, False, or None for
            where it is cheaper.
        momentum, alpha, eps: of the local `RMSProp`, whose state persists across batches; ignored with `local_optimizer`.
        local_optimizer: called with a layer's parameters and `lr=`, such as `torch.optim.SGD`.
        local_schedule: factor on `lr` within a batch: `"linear"` (1 - k/T, at least 1/4), `"constant"`, or
            `factor(step, steps)`.
        prox: weight >= 0 of `|V - W|^2 / 2` in the local objective (1/eta in the paper).
        trust: bound on a layer's change in a step, relative to the norm of its weights, of which the root mean square counts as
            1e-3 at least; None: no bound.
        transfer: the transfer function that follows a layer, by name or pattern of the layer: one of
            `beyondprop.optim.matching.NAMES` or a `Transfer`. What is not named is read from the autograd graphs of the first
            step's backward passes; see `transfers`. Where it cannot be read, a warning names the layer.
        layers: settings for single layers, by name or pattern: `{"head": {"lr": 1e-6, "local_steps": 2}}`.
        exclude: names or patterns of layers that are left to `base`, or of other modules, of which no warning is then given.
        base: factory of the optimizer of all other parameters; default Adam, lr 1e-3.
        pipelined: whether this process trains layers of its own, as one rank of a pipeline does: its local steps then need no
            other. Else several processes without a `DistributedDataParallel` are refused, as their weights would drift apart.

    Attributes:
        transfers: name of the transfer function by layer, as far as they are known: after the first backward pass all are.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of its range.
        UnsupportedModelError: if a layer cannot be captured; the message names it and the way out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = LocoProp(model, lr=1e-5, target_lr=10.0, local_steps=5)
        >>> nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2])).backward()
        >>> optimizer.step()
        >>> optimizer.transfers
        {'0': 'tanh', '2': 'softmax'}
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        *,
        target_lr: float = 10.0,
        local_steps: int = 5,
        loss: str = "matching",
        rows: float | int | None = None,
        gram: bool | None = None,
        momentum: float = 0.999,
        alpha: float = 0.9,
        eps: float = 1e-5,
        local_optimizer: LocalOptimizer | None = None,
        local_schedule: str | Callable[[int, int], float] = "linear",
        prox: float = 0.0,
        trust: float | None = None,
        transfer: Mapping[str, str | Transfer] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        exclude: Iterable[str] = (),
        base: OptimizerFactory | None = None,
        pipelined: bool = False,
    ) -> None:
        defaults = {"lr": lr, "target_lr": target_lr, "local_steps": local_steps, "loss": loss}
        _check_settings(defaults)
        self.rows = _checks.share("rows", rows)
        self.gram = gram
        self.prox = _checks.non_negative("prox", prox)
        self.trust = None if trust is None else _checks.positive("trust", trust)
        if not callable(local_schedule):
            local_schedule = SCHEDULES[_checks.one_of("local_schedule", local_schedule, SCHEDULES)]
        self.local_schedule = local_schedule
        if local_optimizer is None:
            local_optimizer = partial(RMSProp, alpha=alpha, momentum=momentum, eps=eps)
        elif not callable(local_optimizer):
            raise TypeError(
                f"local_optimizer must be callable with parameters and lr=, got {type(local_optimizer).__name__}."
            )
        self._capture = Capture(model, exclude, pipelined=pipelined)
        names = [layer.name for layer in self._capture.layers]
        for what, patterns in (("layers", layers or {}), ("transfer", transfer or {})):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{what} has {pattern!r}, which fits no captured layer; these are {names}.")
        self._locals: list[torch.optim.Optimizer] = []
        for unit in self._capture.units:
            settings = dict(defaults)
            for pattern, own in (layers or {}).items():
                if any(fnmatchcase(layer.name, pattern) for layer in unit.layers):
                    settings |= own
            _check_settings(settings)
            local = local_optimizer(unit.parameters, lr=settings["lr"])
            _check_optimizer("local_optimizer", local)
            if len(local.param_groups) != 1:
                raise ValueError(
                    f"local_optimizer must return an optimizer with one parameter group, got {len(local.param_groups)}; "
                    "settings of single layers go into layers=."
                )
            local.param_groups[0].update({"name": unit.name} | settings)
            self._locals.append(local)
        self._base = None
        if self._capture.others:
            self._base = (base or torch.optim.Adam)([p for _, p in self._capture.others])
            _check_optimizer("base", self._base)
            for group in self._base.param_groups:
                group.setdefault("name", "base")
        super().__init__([group for o in self._owned() for group in o.param_groups], {})
        momenta = [local.param_groups[0].get("momentum") for local in self._locals]
        # What cycles momentum looks for it here, and finds that of the local steps in the groups.
        self.defaults = defaults if None in momenta else defaults | {"momentum": momenta[0]}
        self._share()
        self._transfers = {
            name: f if isinstance(f, Transfer) else matching.transfer(f)
            for pattern, f in (transfer or {}).items()
            for name in names
            if fnmatchcase(name, pattern)
        }
        self._reader = _graph.Reader()
        self._watch()
        self._capture.on_start = weakref.WeakMethod(self._watch)
        self._capture.on_arrival = self._reader.read
        self._capture.attach()
        if (left := left_over(self._capture.root, self._capture.others, self._capture.exclude)) is not None:
            warnings.warn(left, stacklevel=2)

    def _owned(self) -> list[torch.optim.Optimizer]:
        return self._locals if self._base is None else [*self._locals, self._base]

    def _share(self) -> None:
        """Let the optimizers inside work on the groups and the state of this one."""
        groups = list(self.param_groups)
        for optimizer in self._owned():
            count = len(optimizer.param_groups)
            optimizer.param_groups, groups = groups[:count], groups[count:]
            optimizer.state = self.state

    def _watch(self) -> None:
        """Tell the capture of which layers the transfer function is yet to be found, and of which outputs are wanted."""
        solved = zip(self._capture.units, self.param_groups, strict=False)
        curved = {layer.name for unit, group in solved for layer in unit.layers if group["loss"] != "squared"}
        self._reader.forget()
        self._capture.watched = curved - set(self._transfers)
        self._capture.output_layers = curved - {n for n, f in self._transfers.items() if f.is_identity}

    def _settle(self) -> None:
        """Fix the transfer functions that were read; refuse those in compiled code and warn of others that could not be."""
        found, watched = _graph.readings(self._capture.units), self._capture.watched
        if unknown := sorted(name for name, f in found.items() if f == _graph.COMPILED):
            raise UnsupportedModelError(
                f"What follows the layers {unknown} is inside compiled code. Name it, such as "
                f"transfer={{{unknown[0]!r}: 'relu'}}, or 'identity' for the squared loss."
            )
        called = {call.layer.name for unit in self._capture.units for call in unit.calls} & watched
        for why in (_graph.CUT, _graph.PARTS):
            if unread := sorted(name for name in called if found.get(name, _graph.CUT) == why):
                warnings.warn(
                    f"The transfer functions behind the layers {unread} could not be read: what follows is {why}. These layers "
                    f"take the squared loss; name the functions, such as transfer={{{unread[0]!r}: 'tanh'}}, or 'identity' for "
                    "the squared loss.",
                    stacklevel=4,
                )
        identity = matching.transfer("identity")
        self._transfers = {n: identity if isinstance(f, str) else f for n, f in found.items()} | self._transfers
        self._watch()

    @property
    def transfers(self) -> dict[str, str]:
        """The transfer function behind each layer, by the layer's name; of layers with the squared loss, those given."""
        known = _graph.readings(self._capture.units) | self._transfers
        names = [layer.name for layer in self._capture.layers]
        return {name: f.name for name in names if isinstance(f := known.get(name), Transfer)}

    def clear(self) -> None:
        """Forget the backward passes since the last step, whose gradients are not to be used."""
        self._capture.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Solve every layer's local problem and step the base optimizer; `closure` as of `torch.optim.Optimizer.step`.

        Raises:
            NonFiniteError: if a gradient is not finite; no weight was changed.
            UnsupportedModelError: if a gradient is sparse or has no captured call, or if a weight is used besides its layer's
                calls; no weight was changed.
            Exception: whatever the optimizers inside raise, such as for want of memory; no weight was changed then, either.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        written: dict[str, Buffers] = {}  # the weights before, by unit
        try:
            self._capture.check()
            self._watch()
            if self._capture.watched:
                self._settle()
            with whole_precision(self.param_groups[0]["params"][0].device):
                for unit, local in zip(self._capture.units, self._locals, strict=True):
                    self._solve(unit, local, written)
            self._step_base(written)
            good = [keep_finite(before, self.state) for before in written.values()]
        except BaseException as error:
            if written:
                self._restart(written)
                error.add_note(
                    f"No weight was changed; the optimizers of {', '.join(map(repr, written))} start afresh."
                )
            raise
        finally:
            self._capture.clear()
        if good and not bool(torch.stack([fine.to(good[0].device) for fine in good]).all()):
            diverged = [name for name, fine in zip(written, good, strict=True) if not bool(fine)]
            self._restart({name: written[name] for name in diverged})
            warnings.warn(
                f"The local steps of {', '.join(map(repr, diverged))} were not finite: these layers keep their weights for "
                "this batch, and their local optimizer starts afresh. Lower lr or target_lr, or set trust.",
                stacklevel=3,
            )
        return loss

    def _solve(self, unit: Unit, local: torch.optim.Optimizer, written: dict[str, Buffers]) -> None:
        """Make a unit's local steps; note its weights before in `written`."""
        found = {p: p.grad for p in unit.parameters if p.grad is not None}
        if not found:
            return
        for call in unit.calls:
            if call.z is not None and call.weights != call.layer.state():
                call.z = None  # of other weights: it will be computed anew
        before = written[unit.name] = {p: p.detach().clone() for p in found}
        (group,) = local.param_groups
        steps, lr = group["local_steps"], group["lr"]
        problem = None
        buffers = {p: torch.empty_like(p) for p in found}
        try:
            for p, buffer in buffers.items():
                p.grad = buffer
            for step in range(steps):
                for p, gradient in found.items():
                    torch.mul(gradient, group["target_lr"], out=buffers[p])
                if step:
                    if problem is None:
                        of_group = group["loss"], self._transfers, steps, self.rows, self.gram, self._capture.group
                        problem = LocalProblem(unit, before, *of_group)
                    problem.add_corrections(buffers, step)
                    if self.prox:
                        for p, buffer in buffers.items():
                            buffer.add_(p - before[p], alpha=self.prox)
                group["lr"] = lr * self.local_schedule(step, steps)
                local.step()
        finally:
            group["lr"] = lr
            for p, gradient in found.items():
                p.grad = gradient
            unit.calls.clear()
        if self.trust is not None:
            bound(before, self.trust)

    def _step_base(self, written: dict[str, Buffers]) -> None:
        if self._base is None:
            return
        # A table with a sparse gradient is not copied for the few rows that change.
        dense = [p for _, p in self._capture.others if p.grad is not None and p.grad.layout is torch.strided]
        if dense:
            written["base optimizer"] = {p: p.detach().clone() for p in dense}
        try:
            self._base.step()
        except RuntimeError as error:
            sparse = [
                name for name, p in self._capture.others if p.grad is not None and p.grad.layout is not torch.strided
            ]
            if not sparse:
                raise
            raise UnsupportedModelError(
                f"The gradient of {sparse[0]!r} is sparse; {type(self._base).__name__}, the base optimizer, takes dense ones. "
                "Pass a base that takes both, or build its Embedding with sparse=False."
            ) from error

    def _restart(self, written: Mapping[str, Buffers]) -> None:
        """Put weights back; their optimizers, which have seen the step, lose their state."""
        for before in written.values():
            for p, w in before.items():
                p.copy_(w)
                self.state.pop(p, None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and forget what was captured with them; see `torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore what `state_dict` returned; see `torch.optim.Optimizer.load_state_dict`.

        Raises:
            ValueError: if it is of another model.
        """
        names = [group.get("name") for group in state_dict["param_groups"]]
        own = [group.get("name") for group in self.param_groups]
        if names != own:
            raise ValueError(f"This state has the groups {names}, this optimizer has {own}.")
        super().load_state_dict(state_dict)
        self._share()
        self._watch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse with a `TypeError`, once the optimizer is built: groups come from the model's layers."""
        if hasattr(self, "_transfers"):  # the base class adds groups before
            raise TypeError(
                "LocoProp takes its parameters from its model; build a new one for a model with more layers."
            )
        super().add_param_group(param_group)

    def remove_hooks(self) -> None:
        """Take the hooks off the model; the optimizer is of no use afterwards."""
        self._capture.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> LocoProp:
        # Together with its model: the hooks of the copy are on the copied modules.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # A scheduler replaces `step` by a function that is bound to the original.
        new.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items() if key != "step"})
        new._capture.on_start = weakref.WeakMethod(new._watch)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("A LocoProp cannot be pickled, because its hooks are on its model; save its state_dict().")


def _check_optimizer(name: str, optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"{name} must return a torch optimizer whose step takes no closure, got {type(optimizer).__name__}; Adam and SGD "
            "are such."
        )


def _check_settings(settings: Mapping[str, Any]) -> None:
    for key in settings:
        _checks.one_of("layers", key, SETTINGS)
    if not isinstance(settings["lr"], Tensor):
        _checks.non_negative("lr", settings["lr"])
    _checks.positive("target_lr", settings["target_lr"])
    _checks.at_least("local_steps", settings["local_steps"], 1)
    _checks.one_of("loss", settings["loss"], LOSSES)
