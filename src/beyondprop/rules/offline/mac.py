"""The method of auxiliary coordinates: a penalty method whose codes are post-activations.

Carreira-Perpinan & Wang, "Distributed Optimization of Deeply Nested Systems", AISTATS 2014, arXiv 1212.5921:

    mean over rows of  Loss(y, W_{K+1} z_K) + mu / 2 * sum_k |z_k - s(W_k z_{k-1})|^2,    z_0 = x

minimised over weights and codes in turn while mu grows, so that codes and network meet in the end.

| paper | here |
|---|---|
| auxiliary coordinates z_k | codes `"post"`, hidden layers only |
| W-step: one fit a layer, one a hidden unit | `layer_fits.fit_units`, `fit_output` |
| Z-step: one problem a sample | `row_descent.move_codes`, last code first |
| quadratic penalty, mu to infinity | `mu`, `mu_growth`, `mu_limit` |
| post-processing of the last layer | `MAC.refit_output` |
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.errors import NonFiniteError
from beyondprop.rules.guard import first_nonfinite, named
from beyondprop.rules.offline.base import OfflineRule, OfflineState
from beyondprop.rules.offline.layer_fits import fit_output, fit_units
from beyondprop.rules.offline.layers import OfflineLayer, Weights, post_activations, pre_activations, row_pairs, rows
from beyondprop.rules.offline.row_descent import CodeMap, Goal, move_codes, penalty_energy
from beyondprop.stages.losses import LossFunction


class MAC(OfflineRule):
    """The method of auxiliary coordinates; between two growths of mu the relaxed objective never rises.

    Args:
        model, loss: of `OfflineRule`; every activation has a closed-form slope.
        output_loss: `"cross_entropy"` or `"squared"`; default: what `loss` is.
        mu: > 0, weight of the penalties in the first sweep.
        mu_growth: >= 1, factor on mu after every `sweeps_per_mu` sweeps.
        mu_limit: > 0, where the growth ends.
        sweeps_per_mu: >= 1.
        weight_steps: steps on every layer's fit a sweep, >= 1.
        code_steps: gradient steps on every code a sweep, >= 1, each with an exact line search for every row.
        damping: > 0, of the layers' fits, as a share of the mean second moment, on the distance to the old weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))
        >>> rule = MAC(model, nn.CrossEntropyLoss(), mu=0.1, mu_growth=1.2)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> _ = [rule.step(x, y) for _ in range(5)]
        >>> rule.refit_output(x, y)
    """

    LOSSES = ("cross_entropy", "squared")

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        output_loss: str | None = None,
        mu: float = 1.0,
        mu_growth: float = 1.1,
        mu_limit: float = float("inf"),
        sweeps_per_mu: int = 1,
        weight_steps: int = 2,
        code_steps: int = 2,
        damping: float = 1e-5,
    ) -> None:
        super().__init__(model, loss, output_loss=output_loss)
        self.mu, self.mu_growth, self.mu_limit = _checks.growing("mu", mu, mu_growth, mu_limit)
        self.sweeps_per_mu = _checks.at_least("sweeps_per_mu", sweeps_per_mu, 1)
        self.weight_steps = _checks.at_least("weight_steps", weight_steps, 1)
        self.code_steps = _checks.at_least("code_steps", code_steps, 1)
        self.damping = _checks.positive("damping", damping)

    def initial(self, features: Tensor, targets: Tensor) -> OfflineState:
        post = post_activations(self.layers, pre_activations(self.layers, features))
        return OfflineState({"post": post}, {"mu": self.mu, "sweeps": 0})

    def sweep(self, features: Tensor, targets: Tensor, state: OfflineState) -> tuple[OfflineState, list[Weights]]:
        post, numbers, mu = state.codes["post"], dict(state.numbers), state.numbers["mu"]
        fit = partial(self._fit, steps=self.weight_steps)
        weights = list(map(fit, self.layers, [features, *post], [*post, targets]))
        goal = Goal(targets, self.output_loss)
        moved = move_codes(post, self._maps(weights), features, goal, mu, self.code_steps)
        numbers["sweeps"] += 1
        if numbers["sweeps"] % self.sweeps_per_mu == 0:
            numbers["mu"] = max(mu, min(mu * self.mu_growth, self.mu_limit))
        return OfflineState({"post": moved}, numbers), weights

    def _maps(self, weights: list[Weights]) -> list[CodeMap]:
        return [CodeMap(*own, after=layer.after) for layer, own in zip(self.layers, weights, strict=True)]

    def _fit(self, layer: OfflineLayer, below: Tensor, wanted: Tensor, *, steps: int) -> Weights:
        if not layer.trains:
            return layer.now
        chunks = partial(row_pairs, None, below, wanted)
        with self.solving(layer):
            if layer is self.layers[-1]:
                return fit_output(chunks, *layer.now, self.output_loss, steps=steps, damping=self.damping)
            return fit_units(chunks, *layer.now, layer.after, steps=steps, damping=self.damping)

    @torch.no_grad()
    def refit_output(self, x: Tensor, y: Tensor, *, steps: int = 20) -> None:
        """Fit the output layer to what the network's own hidden layers produce: the paper's last step.

        `x` and `y` have all rows; `steps` are those of `layer_fits.fit_output`.

        Raises:
            ValueError: if the output layer is frozen, the batch is empty, or `x` and `y` do not fit each other or the model.
            NonFiniteError: if a NaN or Inf appears; the weights are as before.
        """
        self.check_batch(x, y)
        layer = self.layers[-1]
        if not layer.trains:
            raise ValueError(f"The output layer {layer.name!r} requires no gradient, so that there is nothing to fit.")
        with torch.autocast(x.device.type, enabled=False):
            features, new = self._features(x), layer.now
            targets = self._targets(y, features)
            where = self.locate_nonfinite(x, y)
            if where is None:
                post = post_activations(self.layers, pre_activations(self.layers, features))
                new = self._fit(layer, post[-1], targets, steps=steps)
                where = first_nonfinite((layer.name, found) for found in new)
        if where is not None:
            raise NonFiniteError(
                f"{named(where)} is not finite in the refit of the output layer. No weight was changed. Check the inputs.",
                where=where,
            )
        layer.write(new)

    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        """Return the relaxed objective at the state's mu, that of the next sweep."""
        goal = Goal(targets, self.output_loss)
        return penalty_energy(state.codes["post"], self._maps(weights), features, goal, state.numbers["mu"])

    def measure(self, features: Tensor, state: OfflineState, weights: list[Weights]) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        z, post, maps = features, state.codes["post"], self._maps(weights)
        for layer, produced, below, code in zip(self.layers, maps, [features, *post], post, strict=False):
            z = torch.cat([produced(z[part]) for part in rows(len(z))])
            size, rest = code.norm().clamp_min(1e-30), z.new_zeros((), dtype=torch.float64)
            for part in rows(len(code)):
                rest += (code[part] - produced(below[part])).double().square().sum()
            found[layer.name] = {
                "constraint_gap": rest.sqrt().to(code.dtype) / size,
                "nested_gap": (code - z).norm() / size,
            }
        return found
