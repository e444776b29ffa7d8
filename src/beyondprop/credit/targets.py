"""Targets through learned inverses: target propagation and difference target propagation.

With h_l the output of stage l, f_l the stage, g_l its learned inverse, h'_l the target, L a sample's loss:

| paper | here |
|---|---|
| h'_{top} = h - eta dL/dh, top hidden stage | `delta = -step_size dL/dh` |
| h'_{l-1} = g_l(h'_l), target propagation | `delta_{l-1} = g_l(h_l + delta_l) - h_{l-1}` |
| h'_{l-1} = h_{l-1} - g_l(h_l) + g_l(h'_l), difference target propagation | `delta_{l-1} = g_l(h_l + delta_l) - g_l(h_l)` |
| L_inv, the squared length of g_l(f_l(h + eps)) - (h + eps), eps ~ N(0, sigma^2) | `learn` |

The last stage descends the loss itself. Where an inverse is imperfect, target propagation asks for its error; the
difference cancels it.

Sources: Bengio, "How auto-encoders could provide credit assignment in deep networks via target propagation", 2014, arXiv
1407.7906; Lee, Zhang, Fischer & Bengio, "Difference target propagation", ECML 2015, arXiv 1412.7525, equations 9 to 15.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.credit.base import Credit
from beyondprop.credit.inverses import InverseFactory, apply, mirror
from beyondprop.errors import UnsupportedModelError
from beyondprop.optim.factories import OptimizerFactory, adam
from beyondprop.stages import Chain, LossPoint, Pullback, Trace


class TargetPropagation(Credit):
    """Targets come down through learned inverses of the hidden stages.

    In every step the rule also trains the inverses on the batch, by an optimizer of their own; the targets come from the
    inverses as they were before. Their codes are the outputs of the stages: cut the network after its nonlinearities
    (`cuts=[names]`) for the published form.

    Args:
        inverse: `inverse(below, stage)` returns the module from a stage's output to its input; default `inverses.mirror`, a
            Linear or transposed convolution and the nonlinearity that the input went through.
        step_size: > 0; the top hidden target is its output minus this times the gradient of each sample's loss. (Published
            step sizes multiply the gradient of the mean: they are larger by the batch size.)
        noise: >= 0, standard deviation of the corruption that inverses are trained under.
        noise_halving: > 0; in epoch e, counted from 1, the noise is `noise / (1 + e / noise_halving)`. None: constant.
        optimizer: factory over the inverses' parameters; default Adam, lr 1e-3.
        seed: >= 0, of the inverses' first weights; the corruption comes from torch's global random state.

    Raises:
        UnsupportedModelError: if a stage has no default inverse; the message names it.
    """

    reaches_input = False
    is_homogeneous = False
    takes_difference: bool = False
    """Whether a target moves as the inverse moves, so that the inverse's own error cancels."""

    def __init__(
        self,
        inverse: InverseFactory = mirror,
        *,
        step_size: float = 0.1,
        noise: float = 0.1,
        noise_halving: float | None = None,
        optimizer: OptimizerFactory | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("inverse", inverse), ("optimizer", optimizer)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function, got {type(value).__name__}.")
        self._factory = inverse
        self._optimizer_factory = optimizer or adam(1e-3)
        self.step_size = _checks.positive("step_size", step_size)
        self.noise = _checks.non_negative("noise", noise)
        self.noise_halving = None if noise_halving is None else _checks.positive("noise_halving", noise_halving)
        self.seed = _checks.at_least("seed", seed, 0)
        self.epoch = 0
        self._is_taught = False
        self.inverses: dict[str, nn.Module] = {}
        """The inverses by the name of the stage that they invert: every hidden stage but the first."""

    def bind(self, chain: Chain) -> None:
        super().bind(chain)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            for below, stage in zip(chain, list(chain)[1:-1], strict=False):
                module = self._factory(below, stage)
                if not isinstance(module, nn.Module):
                    raise TypeError(
                        f"inverse(below, stage) must return a torch.nn.Module, got {type(module).__name__} for stage "
                        f"{stage.name!r}."
                    )
                like = stage.parameters[0]
                self.inverses[stage.name] = module.to(device=like.device, dtype=like.dtype)
        self.modules = {f"inverse of {name}": module for name, module in self.inverses.items()}
        parameters = [p for module in self.inverses.values() for p in module.parameters() if p.requires_grad]
        if parameters:
            self.optimizers = (self._optimizer_factory(parameters),)

    @property
    def noise_now(self) -> float:
        """Standard deviation of the corruption in the present epoch."""
        return self.noise if self.noise_halving is None else self.noise / (1 + (self.epoch + 1) / self.noise_halving)

    def learn(self, trace: Trace, scale: float) -> None:
        """Gather the inverses' gradients of `|g(f(h + noise)) - (h + noise)|^2`, summed over features, mean over the batch."""
        self._is_taught = True
        super().learn(trace, scale)

    def learned(self, index: int) -> list[nn.Parameter]:
        inverse = self.inverses.get(self._chain[index].name)
        return [] if inverse is None else [p for p in inverse.parameters() if p.requires_grad]

    def lesson(self, index: int, pullback: Pullback) -> Sequence[Tensor | None]:
        std = self.noise_now
        wanted, image = pullback.input, pullback.output
        if std > 0:
            wanted = wanted + std * torch.randn_like(wanted)
            image = pullback.at(wanted).output
        with torch.enable_grad():
            error = (self._invert(index, image, wanted) - wanted).square().sum() / len(wanted)
            return torch.autograd.grad(error, self.learned(index), allow_unused=True)

    def below(self, index: int, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> Tensor:
        if loss is not None:
            return pullback(delta).mul_(self.step_size)
        with torch.no_grad():
            moved = self._invert(index, pullback.output + delta, pullback.input)
            if self.takes_difference:
                return moved - self._invert(index, pullback.output, pullback.input)
            return moved - pullback.input

    def _invert(self, index: int, h: Tensor, like: Tensor) -> Tensor:
        name = self._chain[index].name
        inverse = self.inverses[name]
        try:
            # Differences of inverses are small: whole precision also under autocast.
            with torch.autocast(h.device.type, enabled=False):
                found = apply(inverse, h, tuple(like.shape[2:]))
        except RuntimeError as error:
            kinds = {f"{p.dtype} on {p.device}" for p in inverse.parameters()}
            if kinds <= {f"{h.dtype} on {h.device}"}:
                raise
            raise ValueError(
                f"The inverse of stage {name!r} has weights of {' and '.join(sorted(kinds))}, the stage sends {h.dtype} on "
                f"{h.device}: convert the model before the rule is built, and move both with rule.to(device)."
            ) from error
        if not isinstance(found, Tensor) or found.shape[:1] != like.shape[:1] or found.numel() != like.numel():
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UnsupportedModelError(
                f"The inverse of stage {name!r} maps its output {tuple(h.shape)} to {got}; its input is {tuple(like.shape)}."
            )
        return found.view_as(like)

    def update(self) -> None:
        """Warn once where steps are made and nobody has trained the inverses, nor in the run that is resumed."""
        if self.optimizers and not self._is_taught and not self.optimizers[0].state:
            self._is_taught = True
            warnings.warn(
                "The inverses were never trained: call rule.begin_epoch(batches) before the steps of every epoch, as fit "
                "does, or use inverse_training='interleaved'.",
                stacklevel=4,
            )

    def end_epoch(self) -> None:
        self.epoch += 1

    def state_dict(self) -> dict[str, object]:
        return {"epoch": self.epoch, "inverses": {n: dict(m.state_dict()) for n, m in self.inverses.items()}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        saved: Any = state["inverses"]
        if list(saved) != list(self.inverses):
            raise ValueError(f"This state holds inverses of {list(saved)}, this network has {list(self.inverses)}.")
        for name, module in self.inverses.items():
            module.load_state_dict(saved[name])
        self.epoch = int(state["epoch"])  # type: ignore[call-overload]

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.noise_halving is None else {"epoch": torch.tensor(self.epoch)}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        super().load_tensors({name: value for name, value in saved.items() if name != "epoch"})
        self.epoch = int(saved.get("epoch", self.epoch))


class DifferenceTargetPropagation(TargetPropagation):
    """Target propagation whose inverses need not be exact: a target moves as the inverse moves (equation 15)."""

    takes_difference = True
