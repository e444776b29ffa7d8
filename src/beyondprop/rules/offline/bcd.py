"""Block coordinate descent with three splittings: every block of variables has a closed-form minimiser.

Lau, Zeng, Wu & Yao, "A Proximal Block Coordinate Descent Algorithm for Deep Neural Network Training", ICLR workshop 2018,
arXiv 1803.09082; Zeng, Lau, Lin & Yao, "Global Convergence of Block Coordinate Descent in Deep Learning", ICML 2019,
arXiv 1803.00225, Algorithm 2.

| paper | here |
|---|---|
| U_l, pre-activations | codes `"pre"` |
| V_l, post-activations; V_N at the output | codes `"post"` |
| gamma / 2 |V_l - s(U_l)|^2 | `gamma` |
| rho / 2 |U_l - W_l V_{l-1} - b_l|^2 | `rho` |
| alpha / 2 |. - old|^2 on V_N, U_l (l < N), W_l, b_l | `alpha` |

Order of a sweep, as in the published code: V_N; then from the last layer to the first U_l, W_l, b_l, V_{l-1}.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.rules.offline.base import OfflineRule, OfflineState
from beyondprop.rules.offline.layers import Weights, in_dtype, post_activations, pre_activations, rows
from beyondprop.rules.offline.least_squares import LeastSquares
from beyondprop.rules.offline.proximal import IDENTITY, feature_prox, piecewise_prox
from beyondprop.stages.losses import LossFunction


class BCD(OfflineRule):
    """Three-splitting block coordinate descent; the relaxed objective never rises.

    The relaxed optimum is not the network's: `gaps` says how far the two are from each other. The codes are two numbers a unit
    and row; during a sweep the old and the new ones are there.

    Args:
        model, loss: of `OfflineRule`; activations are piecewise linear.
        output_loss: `"squared"` (labels become one-hot rows, as published) or `"hinge"`.
        gamma: > 0, weight of V_l = s(U_l).
        rho: > 0, weight of U_l = W_l V_{l-1} + b_l.
        alpha: > 0, weight of the proximal terms.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> rule = BCD(model, nn.CrossEntropyLoss(), output_loss="squared")
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> result = rule.step(x, y, diagnostics=True)
        >>> sorted(result.stages["0"])
        ['activation_gap', 'constraint_gap', 'nested_gap']
    """

    LOSSES = ("squared", "hinge")
    PIECEWISE_ONLY = True

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        output_loss: str | None = None,
        gamma: float = 1.0,
        rho: float = 1.0,
        alpha: float = 5.0,
    ) -> None:
        super().__init__(model, loss, output_loss=output_loss)
        self.gamma = _checks.positive("gamma", gamma)
        self.rho = _checks.positive("rho", rho)
        self.alpha = _checks.positive("alpha", alpha)

    @classmethod
    def paper(
        cls, model: nn.Module, loss: LossFunction, *, generator: torch.Generator | None = None, **changes: Any
    ) -> BCD:
        """Return the published settings for three hidden layers of 1500 units, with the published initial weights.

        gamma = rho = 1, alpha = 5, squared error on one-hot labels, or what `changes` says of these; the model's weights are
        drawn anew from `generator` (default: torch's global one), 0.01 times a standard normal, biases 0.1. Inputs are pixels
        in [0, 1].
        """
        rule = cls(model, loss, **{"output_loss": "squared", **changes})
        with torch.no_grad():
            for layer in rule.layers:
                layer.weight.normal_(0.0, 0.01, generator=generator)
                if layer.bias is not None:
                    layer.bias.fill_(0.1)
        return rule

    def initial(self, features: Tensor, targets: Tensor) -> OfflineState:
        pre = pre_activations(self.layers, features)
        return OfflineState({"pre": pre, "post": [*post_activations(self.layers, pre), pre[-1].clone()]})

    def sweep(self, features: Tensor, targets: Tensor, state: OfflineState) -> tuple[OfflineState, list[Weights]]:
        pre, post = list(state.codes["pre"]), list(state.codes["post"])
        weights = self._weights
        near = self.gamma + self.alpha
        center = torch.add(self.gamma * pre[-1], post[-1], alpha=self.alpha).div_(near)
        post[-1] = self.output_loss.prox(targets, center, near)
        for index in range(len(self.layers) - 1, -1, -1):
            below = post[index - 1] if index else features
            with self.solving(self.layers[index]):
                pre[index], weights[index] = self._fit(index, below, pre[index], post[index])
                if index:
                    post[index - 1] = self._features_of(index, pre[index - 1], pre[index], weights[index])
        return OfflineState({"pre": pre, "post": post}), weights

    def _fit(self, index: int, below: Tensor, pre: Tensor, post: Tensor) -> tuple[Tensor, Weights]:
        """Return U_l and, from it and V_{l-1}, the layer's weights; the rows pass once."""
        layer = self.layers[index]
        weight, bias = layer.now
        is_output = index == len(self.layers) - 1
        pieces = IDENTITY if is_output else self.layers[index + 1].pieces
        alpha = 0.0 if is_output else self.alpha
        moved = torch.empty_like(pre)
        moments = LeastSquares(weight.shape[1], weight.shape[0], weight.device)
        for part in rows(len(pre)):
            center = nn.functional.linear(below[part], weight, bias)
            if alpha:
                center.mul_(self.rho).add_(pre[part], alpha=alpha).div_(self.rho + alpha)
            moved[part] = piecewise_prox(post[part], center, (self.rho + alpha) / self.gamma, pieces)
            if layer.trains:
                moments.add(below[part], moved[part])
        if not layer.trains:
            return moved, layer.now
        return moved, in_dtype(moments.proximal_in_turn(weight, bias, alpha=self.alpha, rho=self.rho), weight)

    def _features_of(self, index: int, pre_below: Tensor, pre: Tensor, weights: Weights) -> Tensor:
        """Return V_{l-1}: between s(U_{l-1}) and what gives U_l."""
        layer = self.layers[index]
        solve = feature_prox(*weights, gamma=self.gamma, rho=self.rho)
        moved = torch.empty_like(pre_below)
        for part in rows(len(pre)):
            moved[part] = solve(layer.features(pre_below[part]), pre[part])
        return moved

    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        total = self.output_loss.values(state.codes["post"][-1], targets).double().sum()
        total += self.split_penalty(features, state, weights, self.gamma, self.rho)
        return total / len(features)
