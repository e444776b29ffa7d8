"""Any credit behind an ordinary `loss.backward()`: autograd carries its deltas where it would carry gradients.

Every stage is one `torch.autograd.Function`. Forward it is `stage.record`; backward it takes the cotangent at its output for
the stage's delta, returns the weights' gradients for that delta, and sends the credit's delta down as the cotangent below:

    delta_l = -cotangent_l / k        k: what a sum over samples is multiplied with in the loss, 1/N for a mean
    cotangent_{l-1} = -k below(delta_l)

So whatever works with gradients works with credit: loops, optimizers, clipping, accumulation, launchers, ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo

from beyondprop import _checks
from beyondprop.credit.base import Credit
from beyondprop.credit.codes import Codes
from beyondprop.credit.feedback import DirectFeedbackAlignment, FeedbackAlignment
from beyondprop.credit.recorded import Batch, Recorded, Swept
from beyondprop.credit.targets import DifferenceTargetPropagation, TargetPropagation
from beyondprop.credit.wrapped import check_plain, group_of, make_alike
from beyondprop.errors import UnsupportedModelError
from beyondprop.optim._units import running_group
from beyondprop.stages.chain import Chain, Cuts, passed
from beyondprop.stages.loss_behind import check_known
from beyondprop.stages.losses import LossFunction, OutputLoss

CREDITS: dict[str, Callable[[], Credit]] = {
    "am": Codes,
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "tp": TargetPropagation,
    "dtp": DifferenceTargetPropagation,
}
"""Credits with their defaults, by the names that `Credited` takes."""
_OWN = "_credit"


class Credited(nn.Module):
    """A model whose `loss.backward()` carries the deltas of a credit in place of gradients; your loop stays as it is.

    It has the model's parameters, buffers and modules under their own names, and in its `state_dict`, which a plain model's
    checkpoint can take the place of; what the credit learns or draws itself comes beside them, under `_credit`. Without
    gradients (evaluation under `torch.no_grad`) the model itself runs.

    Args:
        model: `nn.Sequential`, or any module with `cuts` naming its blocks; it stays yours and is trained in place.
        credit: a credit, or its name: `"am"` (`Codes`), `"fa"`, `"dfa"`, `"tp"` or `"dtp"`.
        loss: the loss that is taken of the output, for credits that ask for its curvature, as codes do:
            `nn.CrossEntropyLoss`, `nn.NLLLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss` without weights. The others do without.
        cuts: where stages end; see `Chain`.
        loss_scale: what the mean (or sum) of the samples' losses is multiplied with before `backward()`, a number or a
            function, such as `scaler.get_scale`. Only credits that are not in proportion to it ask (target propagation, sparse
            codes, published code solvers), and only where the loss is no plain cross-entropy, whose gradient shows it.

    Attributes:
        model: the module that was given.
        credit: the credit; its `state_dict`, `end_epoch` and attributes are there for you.
        chain: the stages.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind, or the credit needs a loss.
        UnsupportedModelError: if the model cannot be cut; the message names the module and the way out. In a backward pass,
            if it is to be differentiated itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> model = Credited(model, "am", loss=nn.CrossEntropyLoss())
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
    """

    is_top = True
    credit: Credit
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        credit: Credit | str = "am",
        loss: LossFunction | None = None,
        *,
        cuts: Cuts = "linear",
        loss_scale: float | Callable[[], float] = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if any(isinstance(m, Credited) for m in model.modules()):
            raise UnsupportedModelError(
                "The model has a Credited or CreditBlock inside already; one credit sends its deltas through a module."
            )
        if isinstance(credit, str):
            credit = CREDITS[_checks.one_of("credit", credit, CREDITS)]()
        if not isinstance(credit, Credit):
            raise TypeError(f"credit must be a Credit or one of {', '.join(CREDITS)}, got {type(credit).__name__}.")
        if not callable(loss_scale):
            _checks.positive("loss_scale", loss_scale)
        if type(credit).assign not in (Credit.assign, Codes.assign):
            raise UnsupportedModelError(
                f"{type(credit).__name__} has an assign of its own: its deltas do not come down from stage to stage, as a "
                "backward pass sends them. Use LocalRule, or give it a `below`."
            )
        self.output_loss = None if loss is None else OutputLoss(loss)
        if self.output_loss is not None:
            check_known(self.output_loss)
        elif self.is_top and isinstance(credit, Codes) and credit.asks_curvature:
            raise ValueError("Codes ask for the curvature of the loss: pass loss=, such as nn.CrossEntropyLoss().")
        self.loss_scale: float | Callable[[], float] = loss_scale
        check_plain(model)
        self.chain = Chain(model, cuts, least=2 if self.is_top else 1)
        credit.is_inside = not self.is_top
        credit.bind(self.chain)
        self._is_alike = False  # the credits of all ranks
        # Not as submodules: the model's own names are those of this module.
        self.__dict__["model"], self.__dict__["credit"] = model, credit
        self._parameters, self._buffers = model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self._modules = dict(model._modules)
        if credit.modules:
            self._modules[_OWN] = nn.ModuleList(credit.modules.values())
        self.training = model.training
        self._seen = list(model._modules.items())
        self._own = tuple(model.parameters())  # walking the modules takes longer than a small net
        self._sweeps = (
            self.is_top and not (credit.of_batch or credit.modules) and type(credit).learned is Credit.learned
        )

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        """Return the model's output on `x` `(N, ...)`."""
        if isinstance(x, fx.Proxy):
            raise UnsupportedModelError(
                f"a {type(self).__name__} has its credit; give a rule the module inside, `model`"
            )
        is_recorded = torch.is_grad_enabled() and (
            (isinstance(x, Tensor) and x.requires_grad) or any(p.requires_grad for p in self._own)
        )
        if is_recorded:
            return self._credited(x, *rest, **named)
        self.credit.group = running_group() or self.credit.group  # a checkpoint runs without gradients first
        return self.model(x, *rest, **named)

    @_disable_dynamo
    def _credited(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if rest or named or not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__} takes one tensor, as a chain of stages does, got "
                f"{', '.join([type(part).__name__ for part in (x, *rest)] + list(named))}."
            )
        if torch._C._is_tracing() or torch.compiler.is_exporting():
            raise UnsupportedModelError(
                "A trace or an export of a model keeps plain gradients in place of a credit's deltas; make it under "
                "torch.no_grad(), where the model itself runs, or of the attribute `model`."
            )
        if [*self.model._modules.items()] != self._seen or any(self._modules.get(n) is not m for n, m in self._seen):
            raise UnsupportedModelError("A module of the model was exchanged, added or taken out; build Credited anew.")
        return self._run(x, 0, len(self.chain))

    def _run(self, x: Tensor, first: int, end: int) -> Tensor:
        """Return what the stages from `first` to the one before `end` make of `x`."""
        group, is_whole = group_of(self.credit), first == 0 and end == len(self.chain)
        self.credit.group = group
        # Ranks exchange gradients stage by stage.
        if is_whole and self._sweeps and group is None and not x.requires_grad:
            return Swept.apply(x, Batch(self, x.device.type, end - 1), *(p for p in self._own if p.requires_grad))
        if is_whole:
            self.chain.check(x)
        else:
            self.chain.check_unchanged()
        if group is not None and not self._is_alike:
            make_alike(self.credit, self.chain, group)
            self._is_alike = True
        lowest, batch = first if x.requires_grad else self.chain.lowest, Batch(self, x.device.type, end - 1)
        z = x
        for index in range(first, end):
            stage = self.chain[index]
            if index < lowest:
                with torch.no_grad():
                    z = passed(stage, z)
            else:
                own = [p for p in stage.parameters if p.requires_grad]
                z = Recorded.apply(z, batch, index, len(own), *own, *self.credit.learned(index))
        return z

    def part(self, first: int, end: int) -> nn.Module:
        """Return the stages from `first` to the one before `end` as a module of its own, such as one rank of a pipeline runs.

        What comes into it must require a gradient, but for the lowest part, so that its delta is sent on.

        Raises:
            ValueError: if there are no such stages.
            UnsupportedModelError: if the credit keeps more than deltas, as direct feedback alignment and target propagation do.
        """
        if not 0 <= first < end <= len(self.chain):
            raise ValueError(f"part must be of stages from 0 to {len(self.chain)}, got {first} to {end}.")
        if self.credit.of_batch or self.credit.modules:
            raise UnsupportedModelError(
                f"{type(self.credit).__name__} keeps more than deltas, which another part does not know; parts take codes or "
                "feedback alignment."
            )
        return Part(self, first, end)

    def train(self, mode: bool = True) -> Credited:
        super().train(mode)
        self.model.training = mode
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.model._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.credit.tensors().items():
            destination[f"{prefix}{_OWN}.{name}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **named: Any) -> None:
        start = f"{prefix}{_OWN}."
        own = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        known = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        self.model._load_from_state_dict(known, prefix, *rest, **named)
        if own:  # a plain model's checkpoint has nothing of a credit
            self.credit.load_tensors({key: value for key, value in own.items() if not key.split(".")[0].isdigit()})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" in self.__dict__ and hasattr(self.__dict__["model"], name):
                return getattr(self.__dict__["model"], name)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Credited:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.credit.group)] = self.credit.group  # the same processes
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("A Credited cannot be pickled, because its stages hold functions; save its state_dict().")

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedModelError(
            "nn.DataParallel copies a module to every device, and a credit's stages are those of one; use "
            "DistributedDataParallel."
        )

    def extra_repr(self) -> str:
        return f"credit={type(self.credit).__name__}"


class CreditBlock(Credited):
    """One block of any network, through which a credit sends the delta that arrives at its output.

    What stands around it (skips, other blocks) carries deltas as it carries gradients. Each block needs a credit of its own;
    its top code is one like the others, as there is no loss at it.

    Args:
        block: an `nn.Sequential` or any module with one tensor in and one out.
        credit: as of `Credited`, one that knows a way through the lowest stage.
        cuts: as of `Credited`; default: an `nn.Sequential` is cut, anything else is one stage.
        loss_scale: as of `Credited`.
    """

    is_top = False

    def __init__(
        self,
        block: nn.Module,
        credit: Credit | str = "am",
        *,
        cuts: Cuts | None = None,
        loss_scale: float | Callable[[], float] = 1.0,
    ) -> None:
        if isinstance(credit, str):
            credit = CREDITS[_checks.one_of("credit", credit, CREDITS)]()
        if isinstance(credit, Credit) and not credit.reaches_input:
            raise UnsupportedModelError(
                f"{type(credit).__name__} has no delta for what comes into a block; use Credited for the whole network."
            )
        if cuts is None:
            cuts = "linear" if isinstance(block, nn.Sequential) else [block]
        super().__init__(block, credit, cuts=cuts, loss_scale=loss_scale)


class Part(nn.Module):
    """Some stages of a `Credited`."""

    owner: Credited

    def __init__(self, owner: Credited, first: int, end: int) -> None:
        super().__init__()
        self.__dict__["owner"], self.first, self.end = owner, first, end
        self.stages = nn.ModuleList(nn.ModuleList(stage.modules) for stage in owner.chain.stages[first:end])

    def train(self, mode: bool = True) -> Part:
        super().train(mode)
        self.owner.model.training = mode  # which functions between the modules ask
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stages make of `x` `(N, ...)`."""
        if torch.is_grad_enabled():
            return self.owner._run(x, self.first, self.end)
        self.owner.chain.check_unchanged()
        for stage in self.owner.chain.stages[self.first : self.end]:
            x = passed(stage, x)
        return x
