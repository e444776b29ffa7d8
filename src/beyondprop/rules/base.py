"""What every learning rule is: it owns the update of a model, one call a batch."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from itertools import chain as one_after_another
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from beyondprop import _checks
from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.functional import check_ranks, drop_inert_hooks
from beyondprop.nn.structure import Structure
from beyondprop.rules.guard import FiniteGuard, Saved, first_nonfinite, is_finite, put_back
from beyondprop.rules.kept import Kept
from beyondprop.rules.ranks import Ranks, unwrapped
from beyondprop.rules.refusals import check_parameters, explain, trainable
from beyondprop.rules.result import StepResult
from beyondprop.rules.shown import shown
from beyondprop.rules.watchdog import Watchdog
from beyondprop.solvers.base import step_all
from beyondprop.stages.losses import LossFunction, OutputLoss


class LearningRule(Kept, abc.ABC):
    """Owns the update of `model`; `step(x, y)` uses one batch.

    A rule implements `backward`, which adds to the parameters' `.grad` as `loss.backward()` would, and lists its
    optimizers, which `update` steps. Learning-rate schedulers attach to those optimizers; gradient clipping and
    accumulation go between `backward` and `update`. What a rule has besides goes into the hooks, which do nothing here:
    `prepare`, `forget`, `activations`, `move`, `own_state`, `load_own_state`, `begin_epoch`, `end_epoch`, `end_task`.

    Args:
        model: the user's module; it is trained in place.
        loss: `loss(output, y)` returning the mean (or sum) over the batch.
        nonfinite: `"raise"` reads one flag from the device before the weights are written, and raises there;
            `"deferred"` never waits for the device: the update is skipped on the device and the error is raised by one of
            the next calls (needs fused optimizers). Default: `"raise"` on a CPU, else `"deferred"` where possible.
        group: process group whose ranks have parts of every batch; default: that of a `DistributedDataParallel` given as the
            model, which is then trained from inside. All ranks make the step of the joint batch.

    Raises:
        TypeError: if `model` is no `nn.Module` or `loss` is not callable.
        ValueError: if the loss reduces by neither mean nor sum.
    """

    model: nn.Module
    loss: OutputLoss
    optimizers: tuple[torch.optim.Optimizer, ...]
    defers_update: bool = True
    """Whether all that `update` changes is inside optimizers, so that these can skip a step on the device."""
    is_wary: bool = False
    """Whether `update` writes more than steps of optimizers, so that what it wrote is looked at in every step."""
    whole_set: bool = False
    """Whether every step takes the whole training set, its rows in one order."""

    why_still: str = "Their gradient may vanish on the way down, or they may have no part in the output."
    """What the watchdog says of a stage that stands still though an optimizer steps it."""
    is_autograd: bool = False
    """Whether gradients and steps are torch's alone, so that parameters may be sharded or lazy, and gradients sparse."""
    takes_ranks: bool = False
    """Whether it sums over a process group what it gathers, so that all ranks make the step of the joint batch."""
    keeps_ranks: bool = False  # whether all comes from gradients that `DistributedDataParallel` averages
    takes_any_input: bool = False
    """Whether the first part of a batch may be anything that the model takes: a tuple, a dict."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        nonfinite: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if self.takes_ranks:
            model, group = unwrapped(model, group)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if nonfinite is not None:
            _checks.one_of("nonfinite", nonfinite, ("raise", "deferred"))
        if not self.is_autograd:
            check_parameters(type(self).__name__, model)
        self.model = model
        self.ranks = Ranks(model, group)
        self.loss = OutputLoss(loss)
        self.optimizers = ()
        drop_inert_hooks(model)
        self._look()
        self.watchdog = Watchdog()
        self._guard = FiniteGuard(nonfinite)
        # Of a step by autograd: memory freed right before a forward pass is taken by it, as in loops that begin by zero_grad.
        self._spent: list[Tensor] = []

    def _look(self) -> None:
        model = self.model
        # Walking the module tree at every step costs more than a small step's products.
        self._parameters = tuple(model.parameters())
        wrappers = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
        wrapped = {p for m in wrappers for p in m.parameters()}
        self._is_averaged = self.keeps_ranks and all(p in wrapped for p in self._parameters)
        self._structure: Structure | None = Structure(model)
        self._asked = self._parameters  # whether they require a gradient
        self._trains = [p.requires_grad for p in self._asked]
        # Places, not tensors: moving a model to another device or dtype replaces its buffers.
        self._buffers = tuple((m._buffers, name) for m in model.modules() for name in m._buffers)
        self._statistics: list[tuple[str, dict[str, Tensor | None], str]] = [
            (module, m._buffers, name)
            for module, m in model.named_modules()
            for name, b in m._buffers.items()
            if b is not None and b.is_floating_point() and not b.is_meta and is_finite([b])  # a mask may be infinite
        ]
        self.is_narrow = any(p.dtype is torch.float16 for p in self._parameters)
        self._stages = {
            name or type(module).__name__: own
            for name, module in model.named_modules()
            if (own := list(module.parameters(recurse=False)))
        }

    @abc.abstractmethod
    def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
        """Add this batch's part to the parameters' `.grad`, times `scale`; change no weight.

        Args:
            x: inputs `(N, ...)`.
            y: targets `(N, ...)`, as the loss takes them.
            scale: weight of this batch among those accumulated before one `update`.
            diagnostics: fill `energy` and `stages` of the result; costs about one more forward pass.
        """

    def update(self) -> None:
        """Change the weights by what `backward` gathered, and forget it.

        Called by itself it trusts the gradients; the check for NaN and Inf is `step`'s. With a group it is here that the ranks'
        parts are summed: a `.grad` seen before, such as for clipping, is this rank's part.
        """
        self.check_model()
        self.reduce()
        self.write()
        self.settle()

    def reduce(self) -> None:
        """Sum over the ranks, where there are several, what `backward` gathered."""
        self.ranks.sum_gradients(self._parameters)
        self.ranks.broadcast(b for place, name in self._buffers if (b := place[name]) is not None)

    def write(self) -> None:
        """Write the weights; `update` without its look at the model."""
        try:
            self.prepare()
            step_all(self.optimizers)
        except (RuntimeError, TypeError) as error:
            explain(error, self.optimizers, self.model)
            self._guard.retell(error, self)
            raise
        finally:
            torch.clear_autocast_cache()  # where one context is around many steps it holds casts of the old weights

    def prepare(self) -> None:
        """Make of what was gathered the gradients that `optimizers` step along, and write what these do not; a hook."""

    def step(self, x: Tensor, y: Tensor, *, diagnostics: bool = False) -> StepResult:
        """Train on one batch: `backward`, then `update`.

        The model's own mode decides about dropout and normalisation statistics; it is not changed. A `.grad` that is there
        already has its part in the step, as in any torch loop.

        Raises:
            ValueError: if the batch is empty, `x` and `y` differ in length, or `y` does not fit the output. Where `x` does not
                fit the first layer, torch's own error says so.
            NonFiniteError: if a NaN or Inf appears; weights, optimizer state and running statistics stay as they were.
        """
        self._spent = []
        self.check_batch(x, y)
        self.check_model()
        saved, guard, parameters = self._saved(), self._guard, self._parameters
        try:
            result = self.backward(x, y, diagnostics=diagnostics)
            guard.steps += 1
            self.reduce()
            gradients = [g for p in parameters if (g := p.grad) is not None]
            gradients += self.gathered()
            statistics = [b for _, place, name in self._statistics if (b := place[name]) is not None]
            gradients += self.ranks.alarm([result.loss, *statistics])
            guard.write(self, (result.loss, gradients, statistics), saved, (x, y))
        except BaseException as error:
            put_back(saved)
            self.discard()
            guard.retell(error, self)
            raise
        self.settle()
        for p in parameters:  # also those that no optimizer has
            p.grad = None
        self._spent = gradients if self.is_autograd else []
        self.watchdog.tick(self.stage_parameters, self._explain)
        return result

    def gathered(self) -> list[Tensor]:
        """Return what `backward` gathered besides gradients, to be checked with them; a hook."""
        return []

    def settle(self) -> None:
        """Know that the weights were written; a hook."""

    def discard(self) -> None:
        """Forget what `backward` gathered."""
        for p in self._parameters:
            p.grad = None
        self.forget()

    def forget(self) -> None:
        """Forget what `backward` gathered elsewhere than in gradients; a hook."""

    def _saved(self) -> Saved:
        return [(b, b.clone()) for place, name in self._buffers if (b := place[name]) is not None]

    def check_batch(self, x: Any, y: Tensor) -> None:
        """Raise where a batch is none that this rule takes."""
        if isinstance(x, Tensor):
            _checks.batch(x, y)
            self.check_input(x)
        elif isinstance(x, list):  # rows that nobody made a tensor of; no rule hands them on
            raise TypeError("x must be a torch.Tensor, got list.")
        elif not self.takes_any_input:
            raise TypeError(
                f"{type(self).__name__} takes the inputs of a batch as one tensor, got {type(x).__name__}: only Backprop hands "
                "on whatever the model takes."
            )

    def check_input(self, x: Tensor) -> None:
        """Raise `ValueError` where `x` is on another device, or of another floating dtype, than the weights."""
        if not self._parameters:
            return
        weight = self._parameters[0]
        if x.device != weight.device:
            raise ValueError(f"x is on {x.device}, the model on {weight.device}; move one of them.")
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "torch.inference_mode() is on: nothing can be trained in it; leave it, or use torch.no_grad()."
            )
        if x.is_floating_point() and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x has dtype {x.dtype}, the model's weights {weight.dtype}; convert one of them.")

    def check_model(self) -> None:
        """Raise `UnsupportedModelError` where the rule was built for another model than there is now.

        A layer that is frozen is left alone from then on, one that is thawed is trained where an optimizer holds it.
        """
        torch.clear_autocast_cache()  # anybody may have written weights since
        if not self._is_averaged:
            check_ranks(type(self).__name__, self.ranks.group)
        if self._structure is not None and not self._structure.is_same:
            if not self.can_follow({p for p in self.model.parameters() if p.requires_grad}):
                self._structure.check()
            self._look()
            self.watchdog.restart()
        if [*map(_REQUIRES_GRAD, self._asked)] != self._trains:
            self._follow()

    def _follow(self) -> None:
        trainable(self.model)
        held = self.held()
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for p, trained in zip(self._asked, self._trains, strict=True):
            if p.requires_grad and not trained and p not in held:
                what = "thawed after the rule was built, and no optimizer of the rule holds it, so that it would never train"
            elif trained and not p.requires_grad and not self.can_freeze(p):
                what = f"frozen after the rule was built, and this {type(self).__name__} solves for it together with others"
            else:
                continue
            raise UnsupportedModelError(f"Parameter {names.get(p, '')!r} was {what}; build the rule anew.")
        self._trains = [p.requires_grad for p in self._asked]
        self.watchdog.restart()

    def held(self) -> set[Tensor]:
        """Return the parameters that the optimizers hold."""
        return {p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}

    def can_follow(self, parameters: set[nn.Parameter]) -> bool:
        """Return whether the model may have other modules now, these its parameters that require a gradient; a hook."""
        return False

    def can_freeze(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter that requires no gradient any more is left alone; a hook: here, where optimizers write."""
        return bool(self.optimizers)

    def stage_parameters(self) -> Mapping[str, list[nn.Parameter]]:
        """Return the parameters of every stage by the stage's name; by module where the rule has no stages."""
        return self._stages

    def _explain(self, stage: str) -> str:
        """Return why a stage may stand still."""
        own = {p for p in self.stage_parameters()[stage] if p.requires_grad}
        groups = [group for o in self.optimizers for group in o.param_groups if not own.isdisjoint(group["params"])]
        if self.optimizers and not groups:
            return (
                "No optimizer of the rule holds them: give it all parameters, or freeze these by requires_grad_(False)."
            )
        if groups and not any(float(group["lr"]) for group in groups):
            return "Their learning rate is 0."
        return self.why_still

    @torch.no_grad()
    def locate_nonfinite(self, x: Tensor, y: Tensor) -> str | None:
        """Return the name of what was non-finite first among inputs, weights, activations and gradients, or None."""
        weights = [(name, p) for name, parameters in self._stages.items() for p in parameters]
        gradients = ((name, p.grad) for name, p in weights)
        statistics = ((module, place[name]) for module, place, name in self._statistics)
        inputs = [(f"x{keystr(path)}", part) for path, part in tree_flatten_with_path(x)[0] if isinstance(part, Tensor)]
        found = one_after_another((*inputs, ("y", y)), weights, self.activations(x), gradients, statistics)
        return first_nonfinite(found)

    def activations(self, x: Tensor) -> Iterable[tuple[str, Tensor | None]]:
        """Return what the rule computes from `x` `(N, ...)` by the stages' names, first stage first; a hook."""
        return ()

    def begin_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Do what the rule does before an epoch; `fit` calls it with the epoch's batches, `run_stream` with the task's.

        A run that is resumed in the middle of an epoch does not repeat it. A hook.
        """

    def end_epoch(self) -> None:
        """Advance the rule's own schedules; `fit` calls it after every epoch, `run_stream` after every task; a hook."""

    def end_task(self) -> None:
        """Know that a task of a stream is over; `streaming.run_stream` calls it. A hook: most rules need not know."""

    def __repr__(self) -> str:
        return shown(self, ("credit", "solver", "optimizers"))


_REQUIRES_GRAD = attrgetter("requires_grad")
