"""Offline alternating minimization: the codes of the whole data set are kept between the sweeps.

The offline baseline of Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", ICML
2019, arXiv 1806.09077: the relaxed objective of the online method,

    mean over rows of  Loss(y, W^{L+1} a^L) + mu / 2 * sum_l |c^l - W^l a^{l-1}|^2,    a^l = s(c^l), a^0 = x

minimised over codes and weights in turn, in full batches.

| paper | here |
|---|---|
| code c^l, a pre-activation | codes `"pre"`, hidden layers only |
| Problems (4) and (5), last code first, each with the code above already moved | `row_descent.move_codes` |
| weights of hidden layers: linear regression | least squares |
| weights of the output layer | majorising steps on the loss, `layer_fits.fit_output` |
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.rules.offline.base import OfflineRule, OfflineState
from beyondprop.rules.offline.layer_fits import fit_output
from beyondprop.rules.offline.layers import OfflineLayer, Weights, in_dtype, pre_activations, row_pairs
from beyondprop.rules.offline.least_squares import LeastSquares, mean_square
from beyondprop.rules.offline.row_descent import CodeMap, Goal, move_codes, penalty_energy
from beyondprop.stages.losses import LossFunction


class OfflineAltMin(OfflineRule):
    """Alternating minimization over the codes and the weights of a whole data set; the relaxed objective never rises.

    Args:
        model, loss: of `OfflineRule`; every activation has a closed-form slope.
        output_loss: `"cross_entropy"` or `"squared"`; default: what `loss` is.
        mu: > 0, weight of the penalties; small mu = codes that move far from what the weights produce.
        code_steps: gradient steps on every code a sweep, >= 1, each with an exact line search for every row.
        output_steps: steps on the output layer's weights a sweep, >= 1.
        damping: > 0, of the least squares, as a share of the mean second moment, on the distance to the old weights.

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
        maps, goal = self._maps(self._weights), Goal(targets, self.output_loss)
        pre = move_codes(state.codes["pre"], maps, features, goal, self.mu, self.code_steps)
        weights = list(map(self._fit, self.layers, [features, *pre], [*pre, targets]))
        return OfflineState({"pre": pre}), weights

    def _maps(self, weights: list[Weights]) -> list[CodeMap]:
        return [CodeMap(*own, before=layer.before) for layer, own in zip(self.layers, weights, strict=True)]

    def _fit(self, layer: OfflineLayer, below: Tensor, wanted: Tensor) -> Weights:
        if not layer.trains:
            return layer.now
        (weight, bias), chunks = layer.now, partial(row_pairs, layer.before, below, wanted)
        with self.solving(layer):
            if layer is self.layers[-1]:
                return fit_output(chunks, weight, bias, self.output_loss, steps=self.output_steps, damping=self.damping)
            moments = LeastSquares(weight.shape[1], weight.shape[0], weight.device)
            for inputs, code in chunks():
                moments.add(inputs, code)
            return in_dtype(moments.proximal(weight, bias, alpha=self.damping * mean_square(moments.gram)), weight)

    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        goal = Goal(targets, self.output_loss)
        return penalty_energy(state.codes["pre"], self._maps(weights), features, goal, self.mu)
