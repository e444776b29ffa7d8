"""Offline alternating minimization: the codes of the whole data set are kept between the sweeps.

The offline baseline of Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", ICML
2019, arXiv 1806.09077: the relaxed objective of the online method,

    mean over rows of  Loss(y, W^{L+1} a^L) + mu / 2 * sum_l |c^l - W^l a^{l-1}|^2,    a^l = s(c^l), a^0 = x

minimised over codes and weights in turn, in full batches.

| paper | here |
|---|---|
| code c^l, a pre-activation | codes `"pre"`, hidden layers only |
| Problems (4) and (5), last code first, each with the code above already moved | `row_descent.descend` |
| weights of hidden layers: linear regression | least squares |
| weights of the output layer | majorising steps on the loss, `layer_fits.fit_output` |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.rules.offline.base import OfflineRule, OfflineState
from beyondprop.rules.offline.layer_fits import fit_output
from beyondprop.rules.offline.layers import Weights, code_gaps, in_dtype, pre_activations, rows
from beyondprop.rules.offline.least_squares import LeastSquares
from beyondprop.rules.offline.row_descent import AffineAfter, Anchor, Goal, descend
from beyondprop.rules.offline.row_losses import ROW_LOSSES
from beyondprop.stages.losses import LossFunction


class OfflineAltMin(OfflineRule):
    """Alternating minimization over the codes and the weights of a whole data set; the relaxed objective never rises.

    Args:
        model: `nn.Sequential` of Linear layers behind reshapes and one activation each that has a closed-form slope.
        loss: `loss(output, y)`.
        output_loss: `"cross_entropy"` or `"squared"`; default: what `loss` is.
        mu: > 0, weight of the penalties; small mu = codes that move far from what the weights produce.
        code_steps: gradient steps on every code a sweep, >= 1, each with an exact line search for every row.
        output_steps: steps on the output layer's weights a sweep, >= 1.
        damping: > 0, of the least squares, as a share of the mean second moment, on the distance to the old weights.

    Raises:
        UnsupportedModelError: if a stage is anything else; the message names it and the way out.
        ValueError: if an argument is out of its range, or the loss cannot be served.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> rule = OfflineAltMin(model, nn.CrossEntropyLoss())
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> before, after = (float(rule.step(x, y, diagnostics=True).energy) for _ in range(2))
        >>> after < before
        True
    """

    LOSSES = ("cross_entropy", "squared")

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        output_loss: str | None = None,
        mu: float = 1.0,
        code_steps: int = 1,
        output_steps: int = 5,
        damping: float = 1e-5,
    ) -> None:
        super().__init__(model, loss, output_loss=output_loss)
        self.mu = _checks.positive("mu", mu)
        self.code_steps = _checks.at_least("code_steps", code_steps, 1)
        self.output_steps = _checks.at_least("output_steps", output_steps, 1)
        self.damping = _checks.positive("damping", damping)

    def initial(self, features: Tensor, targets: Tensor) -> OfflineState:
        return OfflineState({"pre": pre_activations(self.layers, features)[:-1]})

    def sweep(self, features: Tensor, targets: Tensor, state: OfflineState) -> tuple[OfflineState, list[Weights]]:
        old, weights = state.codes["pre"], self._weights
        pre = [torch.empty_like(code) for code in old]
        moments = [LeastSquares(w.shape[1], w.shape[0], w.device) for w, _ in weights[:-1]]
        for part in rows(len(features)):
            for index in range(len(old) - 1, -1, -1):  # last code first; the code below is still the old one
                above = self.layers[index + 1]
                if index == len(old) - 1:
                    goal = Goal(targets[part], self.output_loss)
                else:
                    goal = Goal(pre[index + 1][part], ROW_LOSSES["squared"], self.mu)
                center = nn.functional.linear(self._below(index, part, features, old), *weights[index])
                function = AffineAfter(above.activation, *weights[index + 1], goal)
                pre[index][part] = descend(old[index][part], function, Anchor(center, self.mu), self.code_steps)
            for index, own in enumerate(moments):
                own.add(self._below(index, part, features, pre), pre[index][part])
        for index, (layer, own) in enumerate(zip(self.layers, moments, strict=False)):
            if layer.trains:
                with self.solving(layer):
                    new = own.proximal(*weights[index], alpha=self.damping * own.mean_square())
                weights[index] = in_dtype(new, features)
        if self.layers[-1].trains:
            last, steps = len(self.layers) - 1, self.output_steps

            def chunks() -> list[tuple[Tensor, Tensor]]:
                return [(self._below(last, part, features, pre), targets[part]) for part in rows(len(features))]

            with self.solving(self.layers[-1]):
                weights[-1] = fit_output(chunks, *weights[-1], self.output_loss, steps=steps, damping=self.damping)
        return OfflineState({"pre": pre}), weights

    def _below(self, index: int, part: slice, features: Tensor, pre: list[Tensor]) -> Tensor:
        """Return the inputs of a layer's Linear for some rows."""
        return self.layers[index].features(pre[index - 1][part]) if index else features[part]

    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        pre = state.codes["pre"]
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for part in rows(len(features)):
            for index, affine in enumerate(weights):
                output = nn.functional.linear(self._below(index, part, features, pre), *affine)
                if index < len(pre):
                    total += 0.5 * self.mu * (pre[index][part] - output).double().square().sum()
                else:
                    total += self.output_loss.values(output, targets[part]).double().sum()
        return total / len(features)

    def measure(self, features: Tensor, state: OfflineState, weights: list[Weights]) -> dict[str, dict[str, Tensor]]:
        return code_gaps(self.layers, weights, features, state.codes["pre"])
