"""What methods share that keep auxiliary variables ("codes") for a whole data set: one step is one sweep over all its rows.

A rule of this kind owns codes for one data set. The first `step(x, y)` makes them by a forward pass, so that at the start
the relaxed objective is the mean of the rule's `output_loss` over the network's own outputs; every later step must bring the
same rows. That loss sums over a row's outputs: cross-entropy is `nn.CrossEntropyLoss`, the squared one `|z - y|^2 / 2` is d/2
times `nn.MSELoss` on d outputs; the penalties' weights (mu, gamma, rho, beta) are relative to it. Weights are written in place
in the user's model, whole or not at all: a sweep computes new weights and new codes beside the old ones, all are checked,
then written.
"""

from __future__ import annotations

import abc
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.nn.activations import closed_form
from beyondprop.rules.base import LearningRule, StepResult, trainable
from beyondprop.rules.offline.layers import OfflineLayer, Weights, in_dtype, nested, rows
from beyondprop.rules.offline.proximal import PIECEWISE, pieces_of
from beyondprop.rules.offline.row_losses import RowLoss, row_loss
from beyondprop.stages.affine import AffineStage
from beyondprop.stages.chain import Chain
from beyondprop.stages.losses import LossFunction
from beyondprop.stages.stage import Stage


@dataclass(slots=True)
class OfflineState:
    """What a sweep starts from and what it leaves.

    Attributes:
        codes: lists of tensors `(N, width)` by name, one tensor a layer.
        numbers: the rule's own counts and schedules.
    """

    codes: dict[str, list[Tensor]]
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Fingerprint:
    """Enough of a data set to know it again: shape and one projection of every row."""

    shape: list[int]
    rows: Tensor

    @classmethod
    def of(cls, data: Tensor) -> _Fingerprint:
        flat = data.detach().reshape(len(data), -1)
        # Irrational steps on a circle: no two columns weigh the same, and nothing random is drawn.
        columns = torch.arange(1, flat.shape[1] + 1, dtype=torch.float64) * (math.sqrt(5) - 1) * math.pi
        columns = (1.5 + columns.cos()).to(data.device)
        # In float64, so that another machine's order of summation is no other data set.
        return cls(list(data.shape), torch.cat([flat[part].double() @ columns for part in rows(len(flat))]))

    def equals(self, other: _Fingerprint) -> bool:
        if self.shape != other.shape:
            return False
        scale = self.rows.abs().max().clamp_min(1e-30)
        return bool(((self.rows - other.rows.to(self.rows)).abs() <= 1e-9 * scale).all())


class OfflineRule(LearningRule):
    """Owns codes for one data set; `step(x, y)` is one sweep over all of its rows.

    Subclasses say what their codes are (`initial`), what a sweep does to codes and weights (`sweep`), and how far codes and
    weights are from each other (`gaps`).

    Args:
        model: `nn.Sequential` of Linear layers behind reshapes and one known activation each; trained in place.
        loss: `loss(output, y)`, reported, and the model's loss in an evaluation.
        output_loss: what the codes at the output are fitted to, by name; default: what `loss` itself is.

    Raises:
        UnsupportedModelError: if a stage is anything else; the message names it and the way out.
        ValueError: if the rule cannot serve the loss; the message names those that it can.
    """

    whole_set = True
    defers_update = False
    LOSSES: tuple[str, ...] = ()
    """Names of the output losses that the rule can serve."""
    PIECEWISE_ONLY = False
    """Whether codes are solved for in closed form, which takes piecewise linear activations."""

    def __init__(self, model: nn.Module, loss: LossFunction, *, output_loss: str | None = None) -> None:
        super().__init__(model, loss, nonfinite="raise")
        self.output_loss: RowLoss = row_loss(loss, output_loss, self.LOSSES, type(self).__name__)
        self.chain = Chain(model)
        self._stages = {stage.name: stage.parameters for stage in self.chain}
        self.layers = [self._layer(stage, index) for index, stage in enumerate(self.chain)]
        trainable(model)
        self._forget()

    @abc.abstractmethod
    def initial(self, features: Tensor, targets: Tensor) -> OfflineState:
        """Return the codes that a forward pass makes.

        Args:
            features: inputs of the first Linear `(N, in)`.
            targets: what the output loss takes, `(N, out)` or `(N,)`.
        """

    @abc.abstractmethod
    def sweep(self, features: Tensor, targets: Tensor, state: OfflineState) -> tuple[OfflineState, list[Weights]]:
        """Return new codes and every layer's new weights; change neither `state` nor the model."""

    @abc.abstractmethod
    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        """Return the relaxed objective, mean over the rows, 0-d in float64."""

    @abc.abstractmethod
    def measure(self, features: Tensor, state: OfflineState, weights: list[Weights]) -> dict[str, dict[str, Tensor]]:
        """Return each layer's gaps between codes and weights by the layer's name."""

    @torch.no_grad()
    def start(self, x: Tensor, y: Tensor) -> None:
        """Make the codes for a data set; the first `step` does it where nobody did. Codes of another set are forgotten.

        Args:
            x: all inputs `(N, ...)`.
            y: all targets `(N, ...)`.

        Raises:
            ValueError: if there are no rows, `x` and `y` differ in length, or they do not fit the model.
        """
        _checks.batch(x, y)
        self.check_input(x)
        with torch.autocast(x.device.type, enabled=False):
            features = self._features(x)
            state = self.initial(features, self._targets(y, features))
        self._forget()
        self._state = state
        self._remember(x, y)

    @torch.no_grad()
    def gaps(self, x: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return by stage how far the relaxed solution is from the network: 0-d tensors, 0 where they agree.

        `constraint_gap` is |c - W a - b| / |c| with the codes c above and a below the stage; `nested_gap` compares c with
        what the network computes from x. Rules with two codes a layer add `activation_gap`, |v - s(u)| / |v|.

        Args:
            x: the inputs that the rule was trained on.

        Raises:
            ValueError: if there are no codes yet, or those that there are belong to other rows.
        """
        if self._state is None:
            raise ValueError("There are no codes yet; call start(x, y) or step(x, y) first.")
        self.check_input(x)
        features = self._enter(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.measure(features, self._state, self._weights)

    @torch.no_grad()
    def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
        """Do a sweep beside the present weights and codes; `update` makes it hold.

        `.grad` becomes what the sweep takes off every weight, for the finite check and for `alignment`; to change it changes
        nothing, as the new codes belong to the new weights.

        Raises:
            ValueError: if `scale` is not 1, as sweeps do not add up, or the data is not the data set of the codes.
        """
        if scale != 1.0:
            raise ValueError(f"scale must be 1, got {scale!r}: a sweep is a solution, and solutions do not add up.")
        with torch.autocast(x.device.type, enabled=False):
            features = self._enter(x, y)
            output = nested(self.layers, self._weights, features)
            self.loss.check(output, y)
            targets = self._targets(y, features)
            loss = self.loss(output, y)
            if not bool(loss.isfinite()):
                return StepResult(loss, output)  # the finite check names the culprit
            state = self.initial(features, targets) if self._state is None else self._state
            state, weights = self.sweep(features, targets, state)
            self._check_codes(state)
            weights = [in_dtype(new, features) for new in weights]
            self._pending = state, weights, (x, y)
            for layer, (weight, bias) in zip(self.layers, weights, strict=True):
                if layer.trains:
                    layer.weight.grad = layer.weight.detach() - weight
                    if layer.bias is not None and bias is not None:
                        layer.bias.grad = layer.bias.detach() - bias
            if not diagnostics:
                return StepResult(loss, output)
            energy = self.energy(features, targets, state, weights).to(features.dtype)
            return StepResult(loss, output, energy, self.measure(features, state, weights))

    @torch.no_grad()
    def prepare(self) -> None:
        """Write the weights and codes of the sweep that `backward` did."""
        if self._pending is None:
            return
        self._state, weights, data = self._pending
        for layer, new in zip(self.layers, weights, strict=True):
            if layer.trains:
                layer.write(new)
        self._remember(*data)
        self.discard()

    def forget(self) -> None:
        self._pending = None

    def activations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        z = self._features(x)
        for index, layer in enumerate(self.layers):
            z = nn.functional.linear(layer.features(z) if index else z, *layer.now)
            yield layer.name, z

    def own_state(self) -> dict[str, Any]:
        """Return the codes, N rows for every unit, and what the data is known by."""
        state = self._state
        return {
            "codes": None if state is None else {name: list(codes) for name, codes in state.codes.items()},
            "numbers": None if state is None else dict(state.numbers),
            "data": [{"shape": list(f.shape), "rows": f.rows} for f in self._data],
        }

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `own_state` returned; codes go to the model's device."""
        device = self.layers[0].weight.device
        self._forget()
        if state["codes"] is not None:
            codes = {name: [c.to(device) for c in group] for name, group in state["codes"].items()}
            self._state = OfflineState(codes, dict(state["numbers"]))
        self._data = [_Fingerprint(list(f["shape"]), f["rows"].to(device)) for f in state["data"]]

    @contextmanager
    def solving(self, layer: OfflineLayer) -> Iterator[None]:
        """Name the stage whose linear system cannot be factorised."""
        try:
            yield
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NonFiniteError(
                f"Stage {layer.name!r} is not finite at step {self._guard.steps + 1}: its linear system has no factorisation. "
                "No weight was changed. Check the inputs, or raise the damping.",
                where=layer.name,
            ) from error

    def _layer(self, stage: Stage, index: int) -> OfflineLayer:
        kind = type(self).__name__
        if not isinstance(stage, AffineStage) or not stage.is_linear:
            what = " -> ".join(type(m).__name__ for m in stage.modules)
            raise UnsupportedModelError(
                f"{kind} trains stages of one Linear behind reshapes and one elementwise activation; stage {stage.name!r} is "
                f"{what}. Take out what is more (BatchNorm, dropout, convolutions), or use AltMin, which trains it."
            )
        if index and any(isinstance(m, nn.Unflatten) for m in stage.modules):
            raise UnsupportedModelError(
                f"{kind} keeps codes as rows (N, width); stage {stage.name!r} has an Unflatten behind another Linear."
            )
        module = next((m for m in stage.modules[:-1] if closed_form(m) is not None), None)
        pieces = pieces_of(module)
        if index and self.PIECEWISE_ONLY and pieces is None:
            raise UnsupportedModelError(
                f"{kind} has closed forms for the activations {', '.join(PIECEWISE)}; stage {stage.name!r} has "
                f"{type(module).__name__}. Use one of them, or OfflineAltMin or MAC, which take any."
            )
        if stage.activation is not None and stage.activation.factors is not None:
            raise UnsupportedModelError(
                f"{kind} moves codes along slopes; stage {stage.name!r} has {type(module).__name__}, which has none. "
                "Use AltMin, which has targets for it."
            )
        bias = stage.bias
        if bias is not None and bias.requires_grad != stage.weight.requires_grad:
            raise UnsupportedModelError(
                f"{kind} solves for weight and bias together; of stage {stage.name!r} only one requires a gradient."
            )
        return OfflineLayer(stage.name, stage.weight, bias, stage.activation, pieces, stage.weight.requires_grad)

    def _features(self, x: Tensor) -> Tensor:
        """Return the first Linear's input, whose reshapes may start from images."""
        stage, value = self.chain[0], self.layers[0].features(x)
        assert isinstance(stage, AffineStage)
        for reshape in stage.reshapes:
            value = reshape(value)
        if value.ndim != 2:
            raise ValueError(
                f"x gives stage {stage.name!r} inputs of shape {tuple(value.shape)}; {type(self).__name__} takes one row a "
                "sample, (N, features): put an nn.Flatten first."
            )
        return value

    @property
    def _weights(self) -> list[Weights]:
        return [layer.now for layer in self.layers]

    def _targets(self, y: Tensor, features: Tensor) -> Tensor:
        return self.output_loss.targets(y, self.layers[-1].weight.shape[0], features)

    def _enter(self, x: Tensor, *y: Tensor) -> Tensor:
        """Return the features, after a look at whether the data is the codes' own."""
        features = self._features(x)
        if self._data and not all(self._is_known(index, values) for index, values in enumerate((x, *y))):
            then, now = tuple(self._data[0].shape), tuple(x.shape)
            what = f"shape {then} then, {now} now" if then != now else "other rows, or another order"
            raise ValueError(
                f"This {type(self).__name__} keeps codes for the data set of its first step, and this is another ({what}). "
                "Every step takes the whole set: no mini-batches, no shuffling. For other data call start(x, y), which "
                "forgets the codes and keeps the weights, or use an online rule such as AltMin."
            )
        code = features if self._state is None else next(iter(self._state.codes.values()))[0]
        if (code.dtype, code.device) != (features.dtype, features.device):
            raise ValueError(
                f"The codes are {code.dtype} on {code.device}, x and the weights {features.dtype} on {features.device}: call "
                "start(x, y), which makes new codes, or move model and codes to a device with rule.to."
            )
        return features

    def _is_known(self, index: int, values: Tensor) -> bool:
        """Return whether these are the inputs (0) or the targets (1) of the codes' data set."""
        seen, version = self._seen[index]
        if seen is not None and seen() is values and version == values._version:
            return True
        if values.is_floating_point() and not bool(values.isfinite().all()):
            return list(values.shape) == self._data[index].shape  # the finite check will name it
        return self._data[index].equals(_Fingerprint.of(values))

    def _remember(self, x: Tensor, y: Tensor) -> None:
        if not self._data:
            self._data = [_Fingerprint.of(x), _Fingerprint.of(y)]
        self._seen = (weakref.ref(x), x._version), (weakref.ref(y), y._version)

    def _forget(self) -> None:
        self._state: OfflineState | None = None
        self._pending: tuple[OfflineState, list[Weights], tuple[Tensor, Tensor]] | None = None
        self._data: list[_Fingerprint] = []
        # The very tensors, once they were compared, and their versions.
        self._seen: tuple[tuple[weakref.ref[Tensor] | None, int], ...] = ((None, -1), (None, -1))

    def _check_codes(self, state: OfflineState) -> None:
        for group, codes in state.codes.items():
            for index, code in enumerate(codes):
                if not math.isfinite(float(code.sum())):
                    name = self.layers[-1 if group == "multiplier" else index].name
                    raise NonFiniteError(
                        f"Stage {name!r} is not finite at step {self._guard.steps + 1}: its codes overflow. No weight was "
                        "changed. Check the inputs, or raise the damping.",
                        where=name,
                    )
