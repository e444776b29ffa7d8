"""Training without gradients by the alternating direction method of multipliers.

Taylor, Burmeister, Xu, Singh, Patel & Goldstein, "Training Neural Networks Without Gradients: A Scalable ADMM Approach",
ICML 2016, arXiv 1605.02026, Algorithm 1.

| paper | here |
|---|---|
| z_l, pre-activations | codes `"pre"` |
| a_l, post-activations | codes `"post"` |
| lambda, multiplier of z_L = W_L a_{L-1} | codes `"multiplier"` |
| gamma_l, beta_l | `gamma`, `beta`; here with the factor 1/2, so that the multiplier's step is beta |
| W_l = z_l a_{l-1}^+ | least squares with a bias, `damping` |

Order of a sweep, as published: from the first layer to the last W_l, a_l, z_l; then the multiplier.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.rules.offline.base import OfflineRule, OfflineState
from beyondprop.rules.offline.layers import Weights, in_dtype, post_activations, pre_activations, rows
from beyondprop.rules.offline.least_squares import LeastSquares
from beyondprop.rules.offline.proximal import feature_prox, piecewise_prox
from beyondprop.stages.losses import LossFunction


class ADMM(OfflineRule):
    """ADMM with one multiplier, on the output, and least-squares weights.

    Hidden constraints are penalties alone, so the relaxed solution is not the network's: `gaps` says how far the two are from
    each other. There is no step length and no guarantee of descent.

    Args:
        model, loss: of `OfflineRule`; activations are piecewise linear.
        output_loss: `"hinge"` (as published, on labels or rows of 0 and 1) or `"squared"`.
        gamma: > 0, weight of a_l = h(z_l).
        beta: > 0, weight of z_l = W_l a_{l-1} + b_l.
        warm_start: sweeps before the multiplier moves, >= 0.
        damping: >= 0, ridge of the least squares as a share of the mean second moment.
        initial_codes: `"forward"`: codes from the network's forward pass; `"normal"`: independent standard normal numbers,
            as published, which forget the initial weights.
        generator: where normal codes come from; default: torch's global one.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(0, 1), nn.Linear(8, 2))
        >>> rule = ADMM(model, nn.CrossEntropyLoss(), output_loss="hinge")
        >>> result = rule.step(torch.randn(16, 4), torch.randint(2, (16,)))
        >>> result.output.shape
        torch.Size([16, 2])
    """

    LOSSES = ("hinge", "squared")
    PIECEWISE_ONLY = True

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        output_loss: str | None = None,
        gamma: float = 10.0,
        beta: float = 1.0,
        warm_start: int = 10,
        damping: float = 1e-2,
        initial_codes: str = "forward",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, loss, output_loss=output_loss)
        self.gamma = _checks.positive("gamma", gamma)
        self.beta = _checks.positive("beta", beta)
        self.warm_start = _checks.at_least("warm_start", warm_start, 0)
        self.damping = _checks.non_negative("damping", damping)
        self.initial_codes = _checks.one_of("initial_codes", initial_codes, ("forward", "normal"))
        self.generator = generator

    def initial(self, features: Tensor, targets: Tensor) -> OfflineState:
        pre = pre_activations(self.layers, features)
        if self.initial_codes == "normal":
            pre = [u.normal_(generator=self.generator) for u in pre]
            post = [torch.empty_like(u).normal_(generator=self.generator) for u in pre[:-1]]
        else:
            post = post_activations(self.layers, pre)
        return OfflineState({"pre": pre, "post": post, "multiplier": [torch.zeros_like(pre[-1])]}, {"sweeps": 0})

    def sweep(self, features: Tensor, targets: Tensor, state: OfflineState) -> tuple[OfflineState, list[Weights]]:
        pre, post = list(state.codes["pre"]), list(state.codes["post"])
        (multiplier,) = state.codes["multiplier"]
        weights = self._weights
        for index, layer in enumerate(self.layers):
            below = post[index - 1] if index else features
            with self.solving(layer):
                if layer.trains:
                    weights[index] = self._fit(below, pre[index], bias=layer.bias is not None)
                if index < len(post):
                    post[index], pre[index] = self._codes_of(index, below, pre, weights)
        linear = torch.cat([nn.functional.linear(post[-1][part], *weights[-1]) for part in rows(len(features))])
        pre[-1] = self.output_loss.prox(targets, torch.sub(linear, multiplier, alpha=1 / self.beta), self.beta)
        sweeps = state.numbers["sweeps"] + 1
        if sweeps > self.warm_start:
            multiplier = torch.add(multiplier, pre[-1] - linear, alpha=self.beta)
        return OfflineState({"pre": pre, "post": post, "multiplier": [multiplier]}, {"sweeps": sweeps}), weights

    def _fit(self, below: Tensor, pre: Tensor, *, bias: bool) -> Weights:
        moments = LeastSquares(below.shape[1], pre.shape[1], below.device)
        for part in rows(len(below)):
            moments.add(below[part], pre[part])
        return in_dtype(moments.solve(self.damping, bias=bias), below)

    def _codes_of(self, index: int, below: Tensor, pre: list[Tensor], weights: list[Weights]) -> tuple[Tensor, Tensor]:
        """Return a_l, then z_l."""
        above = self.layers[index + 1]
        solve = feature_prox(*weights[index + 1], gamma=self.gamma, rho=self.beta)
        active, moved = torch.empty_like(pre[index]), torch.empty_like(pre[index])
        for part in rows(len(below)):
            active[part] = solve(above.features(pre[index][part]), pre[index + 1][part])
            center = nn.functional.linear(below[part], *weights[index])
            moved[part] = piecewise_prox(active[part], center, self.beta / self.gamma, above.pieces)
        return active, moved

    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        """Return the augmented Lagrangian, mean over the rows."""
        output, (multiplier,) = state.codes["pre"][-1], state.codes["multiplier"]
        linear = nn.functional.linear(state.codes["post"][-1], *weights[-1])
        total = self.output_loss.values(output, targets).double().sum()
        total += (multiplier * (output - linear)).double().sum()
        total += self.split_penalty(features, state, weights, self.gamma, self.beta)
        return total / len(features)
