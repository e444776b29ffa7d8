"""What methods share that keep auxiliary variables ("codes") for a whole data set.

The first `step(x, y)` makes the codes by a forward pass, so that at the start the relaxed objective is the mean of the rule's
`output_loss` over the network's own outputs; every later step must bring the same rows. That loss sums over a row's outputs:
cross-entropy is `nn.CrossEntropyLoss`, the squared one `|z - y|^2 / 2` is d/2 times `nn.MSELoss` on d outputs; the penalties'
weights (mu, gamma, rho, beta) are relative to it. A sweep computes new weights and new codes beside the old ones; all are
checked, then written, the weights in place in the user's model.
"""

from __future__ import annotations

import abc
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.errors import NonFiniteError, UnsupportedModelError
from beyondprop.nn.activations import closed_form
from beyondprop.rules.base import LearningRule, StepResult, trainable
from beyondprop.rules.offline.layers import OfflineLayer, Weights, pre_activations, rows, value_of
from beyondprop.rules.offline.proximal import PIECEWISE, pieces_of
from beyondprop.rules.offline.row_losses import RowLoss, row_loss
from beyondprop.stages import AffineStage, Chain, LossFunction, Stage


@dataclass(slots=True)
class OfflineState:
    """What a sweep starts from and what it leaves: codes `(N, width)` by name, one a layer; the rule's counts and schedules."""

    codes: dict[str, list[Tensor]]
    numbers: dict[str, float] = field(default_factory=dict)


class OfflineRule(LearningRule):
    """Owns codes for one data set; `step(x, y)` is one sweep over all of its rows.

    Subclasses say what their codes are (`initial`), what a sweep does to codes and weights (`sweep`), what for (`energy`), and,
    where codes are others than u and v, how far codes and weights are from each other (`measure`).

    Args:
        model: `nn.Sequential` of Linear layers behind reshapes and one known activation each; trained in place.
        loss: `loss(output, y)`, reported, and the model's loss in an evaluation.
        output_loss: what the codes at the output are fitted to, by name; default: what `loss` itself is.

    Raises:
        UnsupportedModelError: if a stage is anything else; the message names it and the way out.
        ValueError: if an argument is out of its range, or the rule cannot serve the loss; the message says what is accepted.
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
        self._structure = None  # the chain asks in every pass
        self._stages = {stage.name: stage.parameters for stage in self.chain}
        self.layers = [self._layer(stage, index) for index, stage in enumerate(self.chain)]
        for layer, above in pairwise(self.layers):
            layer.after = above.before
        trainable(model)
        self._forget()

    @abc.abstractmethod
    def initial(self, features: Tensor, targets: Tensor) -> OfflineState:
        """Return the codes that a forward pass makes.

        `features` `(N, in)` are the inputs of the first Linear, `targets` `(N, out)` or `(N,)` what the output loss takes.
        """

    @abc.abstractmethod
    def sweep(self, features: Tensor, targets: Tensor, state: OfflineState) -> tuple[OfflineState, list[Weights]]:
        """Return new codes and every layer's new weights in the model's dtype; change neither `state` nor the model."""

    @abc.abstractmethod
    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        """Return the relaxed objective, mean over the rows, 0-d in float64."""

    def measure(self, features: Tensor, state: OfflineState, weights: list[Weights]) -> dict[str, dict[str, Tensor]]:
        """Return `gaps` by the layer's name, here for codes u, `"pre"`, and, unless v = s(u) always, v, `"post"`.

        Those of the output may be left out.
        """
        pre, post = state.codes["pre"], state.codes.get("post")
        given = [features, *(post or pre)]
        found: dict[str, dict[str, list[Tensor]]] = {}
        for part in rows(len(features)):
            z = features[part]
            for index, u in enumerate(pre):
                layer, affine, code = self.layers[index], weights[index], u[part]
                below = given[index][part] if post else layer.features(given[index][part])
                z = F.linear(z, *affine)
                distances = {"constraint_gap": (F.linear(below, *affine), code), "nested_gap": (z, code)}
                if post and index < len(post):
                    distances["activation_gap"] = value_of(layer.after, code), post[index][part]
                z = value_of(layer.after, z)
                own = found.setdefault(layer.name, {})
                for name, (wanted, is_now) in distances.items():
                    sums = torch.stack([(is_now - wanted).square().sum(), is_now.square().sum()]).double()
                    own.setdefault(name, []).append(sums)
        return {name: {key: _ratio(sums, features) for key, sums in own.items()} for name, own in found.items()}

    def split_penalty(
        self, features: Tensor, state: OfflineState, weights: list[Weights], gamma: float, rho: float
    ) -> Tensor:
        """Return `gamma |v - s(u)|^2 / 2 + rho |u - W v_below - b|^2 / 2`, summed over layers and rows, 0-d in float64.

        Codes are as for `measure`; the output's v may be left out.
        """
        pre, post = state.codes["pre"], state.codes["post"]
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for index, (layer, affine) in enumerate(zip(self.layers, weights, strict=True)):
            below = post[index - 1] if index else features
            for part in rows(len(features)):
                rest = pre[index][part] - F.linear(below[part], *affine)
                total += 0.5 * rho * rest.double().square().sum()
                if index < len(post):
                    rest = post[index][part] - value_of(layer.after, pre[index][part])
                    total += 0.5 * gamma * rest.double().square().sum()
        return total

    @torch.no_grad()
    def start(self, x: Tensor, y: Tensor) -> None:
        """Make the codes for all rows of a data set; the first `step` does it where nobody did. Other codes are forgotten.

        Raises:
            ValueError: if there are no rows, `x` and `y` differ in length, or they do not fit the model.
        """
        self.check_batch(x, y)
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
            output = pre_activations(self.layers, features)[-1]
            self.loss.check(output, y)
            targets = self._targets(y, features)
            loss = self.loss(output, y)
            if not bool(loss.isfinite()):
                return StepResult(loss, output)  # the finite check names the culprit
            state = self.initial(features, targets) if self._state is None else self._state
            state, weights = self.sweep(features, targets, state)
            self._check_codes(state)
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

    def activations(self, x: Tensor) -> Iterable[tuple[str, Tensor]]:
        names = (layer.name for layer in self.layers)
        return zip(names, pre_activations(self.layers, self._features(x)), strict=True)

    def own_state(self) -> dict[str, Any]:
        """Return the codes, N rows for every unit, and what the data is known by."""
        state = self._state
        return {
            "codes": None if state is None else {name: list(codes) for name, codes in state.codes.items()},
            "numbers": None if state is None else dict(state.numbers),
            "data": list(self._data),
        }

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        device = self.layers[0].weight.device
        self._forget()
        if state["codes"] is not None:
            codes = {name: [c.to(device) for c in group] for name, group in state["codes"].items()}
            self._state = OfflineState(codes, dict(state["numbers"]))
        self._data = [{**known, "rows": known["rows"].to(device)} for known in state["data"]]

    @contextmanager
    def solving(self, layer: OfflineLayer) -> Iterator[None]:
        """Name the stage whose linear system cannot be factorised."""
        try:
            yield
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise self._not_finite(layer, "its linear system has no factorisation") from error

    def _not_finite(self, layer: OfflineLayer, why: str) -> NonFiniteError:
        return NonFiniteError(
            f"Stage {layer.name!r} is not finite at step {self._guard.steps + 1}: {why}. No weight was changed. Check the "
            "inputs, or raise the damping.",
            where=layer.name,
        )

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
        before = stage.activation if index else None
        return OfflineLayer(stage.name, stage.weight, bias, before, pieces, stage.weight.requires_grad)

    def _features(self, x: Tensor) -> Tensor:
        """Return the first Linear's input, whose reshapes may start from images."""
        self.chain.check_unchanged()
        stage = self.chain[0]
        assert isinstance(stage, AffineStage)
        value = value_of(stage.activation, x)
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
            then, now = tuple(self._data[0]["shape"]), tuple(x.shape)
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
        (seen, version), known = self._seen[index], self._data[index]
        if seen is not None and seen() is values and version == values._version:
            return True
        if list(values.shape) != known["shape"]:
            return False
        if values.is_floating_point() and not bool(values.isfinite().all()):
            return True  # the finite check will name it
        atol = 1e-9 * float(known["rows"].abs().max().clamp_min(1e-30))
        return torch.allclose(known["rows"], _projected(values).to(known["rows"]), rtol=0.0, atol=atol)

    def _remember(self, x: Tensor, y: Tensor) -> None:
        if not self._data:
            self._data = [{"shape": list(data.shape), "rows": _projected(data)} for data in (x, y)]
        self._seen = (weakref.ref(x), x._version), (weakref.ref(y), y._version)

    def _forget(self) -> None:
        self._state: OfflineState | None = None
        self._pending: tuple[OfflineState, list[Weights], tuple[Tensor, Tensor]] | None = None
        self._data: list[dict[str, Any]] = []
        # The very tensors, once they were compared, and their versions.
        self._seen: tuple[tuple[weakref.ref[Tensor] | None, int], ...] = ((None, -1), (None, -1))

    def _check_codes(self, state: OfflineState) -> None:
        for group, codes in state.codes.items():
            for index, code in enumerate(codes):
                if not math.isfinite(float(code.sum())):
                    raise self._not_finite(self.layers[-1 if group == "multiplier" else index], "its codes overflow")


def _ratio(sums: list[Tensor], like: Tensor) -> Tensor:
    above, below = torch.stack(sums).sum(0).sqrt()
    return (above / below.clamp_min(1e-30)).to(like.dtype)


def _projected(data: Tensor) -> Tensor:
    """Return one number for every row, by which a data set is known again, `(N,)`."""
    flat = data.detach().reshape(len(data), -1)
    # Irrational steps on a circle: no two columns weigh the same, and nothing random is drawn.
    columns = torch.arange(1, flat.shape[1] + 1, dtype=torch.float64) * (math.sqrt(5) - 1) * math.pi
    columns = (1.5 + columns.cos()).to(data.device)
    # In float64, so that another machine's order of summation is no other data set.
    return torch.cat([flat[part].double() @ columns for part in rows(len(flat))])
