"""The method of auxiliary coordinates: a penalty method whose codes are post-activations.

Carreira-Perpinan & Wang, "Distributed Optimization of Deeply Nested Systems", AISTATS 2014, arXiv 1212.5921:

    mean over rows of  Loss(y, W_{K+1} z_K) + mu / 2 * sum_k |z_k - s(W_k z_{k-1})|^2,    z_0 = x

minimised over weights and codes in turn while mu grows, so that codes and network meet in the end.

| paper | here |
|---|---|
| auxiliary coordinates z_k | codes `"post"`, hidden layers only |
| W-step: one fit a layer, one a hidden unit | `layer_fits.fit_units`, `fit_output` |
| Z-step: one problem a sample | `row_descent.descend`, last code first |
| quadratic penalty, mu to infinity | `mu`, `mu_growth`, `mu_limit` |
| post-processing of the last layer | `MAC.refit_output` |
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.errors import NonFiniteError
from beyondprop.rules.guard import named
from beyondprop.rules.offline.base import OfflineRule, OfflineState
from beyondprop.rules.offline.layer_fits import fit_output, fit_units
from beyondprop.rules.offline.layers import Weights, pre_activations, rows
from beyondprop.rules.offline.row_descent import AffineBefore, Anchor, Goal, descend
from beyondprop.rules.offline.row_losses import ROW_LOSSES
from beyondprop.stages.losses import LossFunction


class MAC(OfflineRule):
    """The method of auxiliary coordinates; between two growths of mu the relaxed objective never rises.

    Args:
        model: `nn.Sequential` of Linear layers behind reshapes and one activation each that has a closed-form slope.
        loss: `loss(output, y)`.
        output_loss: `"cross_entropy"` or `"squared"`; default: what `loss` is.
        mu: > 0, weight of the penalties in the first sweep.
        mu_growth: >= 1, factor on mu after every `sweeps_per_mu` sweeps.
        mu_limit: > 0, where the growth ends.
        sweeps_per_mu: >= 1.
        weight_steps: steps on every layer's fit a sweep, >= 1.
        code_steps: gradient steps on every code a sweep, >= 1, each with an exact line search for every row.
        damping: > 0, of the layers' fits, as a share of the mean second moment, on the distance to the old weights.

    Raises:
        UnsupportedModelError: if a stage is anything else; the message names it and the way out.
        ValueError: if an argument is out of its range, or the loss cannot be served.

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
        self.mu = _checks.positive("mu", mu)
        if not mu_growth >= 1:
            raise ValueError(f"mu_growth must be >= 1, got {mu_growth!r}.")
        if not mu_limit > 0:
            raise ValueError(f"mu_limit must be > 0, got {mu_limit!r}.")
        self.mu_growth = mu_growth
        self.mu_limit = mu_limit
        self.sweeps_per_mu = _checks.at_least("sweeps_per_mu", sweeps_per_mu, 1)
        self.weight_steps = _checks.at_least("weight_steps", weight_steps, 1)
        self.code_steps = _checks.at_least("code_steps", code_steps, 1)
        self.damping = _checks.positive("damping", damping)

    def initial(self, features: Tensor, targets: Tensor) -> OfflineState:
        return OfflineState({"post": self._posts(features)}, {"mu": self.mu, "sweeps": 0})

    def _posts(self, features: Tensor) -> list[Tensor]:
        pre = pre_activations(self.layers, features)
        return [layer.features(u) for layer, u in zip(self.layers[1:], pre, strict=False)]

    def sweep(self, features: Tensor, targets: Tensor, state: OfflineState) -> tuple[OfflineState, list[Weights]]:
        post, numbers, mu = state.codes["post"], dict(state.numbers), state.numbers["mu"]
        weights = [self._fit(index, features, targets, post) for index in range(len(self.layers))]
        moved = [torch.empty_like(code) for code in post]
        for part in rows(len(features)):
            for index in range(len(post) - 1, -1, -1):  # last code first; the code below is still the old one
                if index == len(post) - 1:
                    goal, after = Goal(targets[part], self.output_loss), None
                else:
                    goal = Goal(moved[index + 1][part], ROW_LOSSES["squared"], mu)
                    after = self.layers[index + 2].activation
                below = post[index - 1][part] if index else features[part]
                center = self.layers[index + 1].features(nn.functional.linear(below, *weights[index]))
                function = AffineBefore(after, *weights[index + 1], goal)
                moved[index][part] = descend(post[index][part], function, Anchor(center, mu), self.code_steps)
        numbers["sweeps"] += 1
        if numbers["sweeps"] % self.sweeps_per_mu == 0:
            numbers["mu"] = max(mu, min(mu * self.mu_growth, self.mu_limit))
        return OfflineState({"post": moved}, numbers), weights

    @torch.no_grad()
    def refit_output(self, x: Tensor, y: Tensor, *, steps: int = 20) -> None:
        """Fit the output layer to what the network's own hidden layers produce: the paper's last step.

        Args:
            x: all inputs `(N, ...)`.
            y: all targets.
            steps: of `layer_fits.fit_output`.

        Raises:
            ValueError: if the output layer is frozen, the batch is empty, or `x` and `y` do not fit each other or the model.
            NonFiniteError: if a NaN or Inf appears; the weights are as before.
        """
        _checks.batch(x, y)
        self.check_input(x)
        layer = self.layers[-1]
        if not layer.trains:
            raise ValueError(f"The output layer {layer.name!r} requires no gradient, so that there is nothing to fit.")
        with torch.autocast(x.device.type, enabled=False):
            features = self._features(x)
            targets = self._targets(y, features)
            if where := self.locate_nonfinite(x, y):
                raise _not_refitted(where)
            post = self._posts(features)
            chunks = partial(self._chunks, len(post), features, targets, post)
            with self.solving(layer):
                weight, bias = fit_output(chunks, *layer.now, self.output_loss, steps=steps, damping=self.damping)
        if not all(bool(found.isfinite().all()) for found in (weight, bias) if found is not None):
            raise _not_refitted(layer.name)
        layer.write((weight, bias))

    def _fit(self, index: int, features: Tensor, targets: Tensor, post: list[Tensor]) -> Weights:
        """Return a layer's weights after some steps on its own problem."""
        layer = self.layers[index]
        if not layer.trains:
            return layer.now
        chunks = partial(self._chunks, index, features, targets, post)
        with self.solving(layer):
            if index == len(post):
                return fit_output(chunks, *layer.now, self.output_loss, steps=self.weight_steps, damping=self.damping)
            above = self.layers[index + 1]
            return fit_units(chunks, *layer.now, above.activation, steps=self.weight_steps, damping=self.damping)

    @staticmethod
    def _chunks(index: int, features: Tensor, targets: Tensor, post: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        below = post[index - 1] if index else features
        goal = post[index] if index < len(post) else targets
        return [(below[part], goal[part]) for part in rows(len(features))]

    def energy(self, features: Tensor, targets: Tensor, state: OfflineState, weights: list[Weights]) -> Tensor:
        """Return the relaxed objective at the state's mu, that of the next sweep."""
        post, mu = state.codes["post"], state.numbers["mu"]
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for part in rows(len(features)):
            for index, affine in enumerate(weights):
                below = post[index - 1][part] if index else features[part]
                output = nn.functional.linear(below, *affine)
                if index < len(post):
                    rest = post[index][part] - self.layers[index + 1].features(output)
                    total += 0.5 * mu * rest.double().square().sum()
                else:
                    total += self.output_loss.values(output, targets[part]).double().sum()
        return total / len(features)

    def measure(self, features: Tensor, state: OfflineState, weights: list[Weights]) -> dict[str, dict[str, Tensor]]:
        """Return each hidden layer's gaps; the codes are post-activations here."""
        found: dict[str, dict[str, Tensor]] = {}
        z = features
        for index, code in enumerate(state.codes["post"]):
            above, below = self.layers[index + 1], state.codes["post"][index - 1] if index else features
            z = torch.cat([above.features(nn.functional.linear(z[part], *weights[index])) for part in rows(len(z))])
            size, rest = code.norm().clamp_min(1e-30), z.new_zeros((), dtype=torch.float64)
            for part in rows(len(code)):
                produced = above.features(nn.functional.linear(below[part], *weights[index]))
                rest += (code[part] - produced).double().square().sum()
            found[self.layers[index].name] = {
                "constraint_gap": rest.sqrt().to(code.dtype) / size,
                "nested_gap": (code - z).norm() / size,
            }
        return found


def _not_refitted(where: str) -> NonFiniteError:
    return NonFiniteError(
        f"{named(where)} is not finite in the refit of the output layer. No weight was changed. Check the inputs.",
        where=where,
    )
