"""Difference target propagation, and target propagation without the difference.

Lee, Zhang, Fischer & Bengio, "Difference target propagation", ECML 2015, arXiv 1412.7525. Algorithm 1 here:

| paper | here |
|---|---|
| compute unit values for all layers | `Chain.record`, cut after the nonlinearities |
| first target, associated targets for lower layers | `credit.DifferenceTargetPropagation.below` |
| training feedback (inverse) mapping | `credit.DifferenceTargetPropagation.learn` |
| training feedforward mapping | `solvers.Descent` |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.credit.inverses import InverseFactory, mirror
from beyondprop.credit.targets import DifferenceTargetPropagation, TargetPropagation
from beyondprop.errors import NonFiniteError
from beyondprop.nn.binary import Sign, Threshold
from beyondprop.optim.factories import OptimizerFactory, centered_rmsprop
from beyondprop.rules.guard import is_finite, named, put_back
from beyondprop.rules.local import LocalRule
from beyondprop.rules.ranks import unwrapped
from beyondprop.solvers import Descent, Solver
from beyondprop.solvers.base import step_all
from beyondprop.stages import LossFunction, Stage
from beyondprop.stages.chain import Cuts, flatten
from beyondprop.stages.stage import NORMS


class DifferenceTargetProp(LocalRule):
    """Difference target propagation: targets come down through learned inverses.

    `optimizers` has the weights' optimizers first and the inverses' last: schedulers attached to all of them decay both,
    which is what a schedule over a run means; attach to `rule.solver.optimizers` or `rule.credit.optimizers` for one side.

    Args:
        model: `nn.Sequential`, or any module with `cuts` naming its blocks; it stays yours and is trained in place.
        loss: `loss(output, y)`, mean or sum over the batch.
        weight_solver: a solver, or an optimizer factory for `Descent`; default Adam, lr 3e-3, one step.
        inverse: `inverse(below, stage)` returns the module from a stage's output to its input; see `TargetPropagation`.
        inverse_optimizer: factory over the inverses' parameters; default Adam, lr 1e-3.
        inverse_training: `"interleaved"`: every step trains the inverses on its batch, too, and its targets come from those
            of the step before; `"epoch"`: `begin_epoch` trains them on one whole pass (the published order), which
            `fit` calls, and your own loop must.
        difference: False leaves the difference out: target propagation.
        step_size, noise, noise_halving, seed: of `TargetPropagation`.
        cuts: `"activation"`: stages end after their nonlinearity and pooling, see `activation_cuts`; or see `Chain`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> rule = DifferenceTargetProp(model, nn.CrossEntropyLoss())
        >>> result = rule.step(torch.randn(16, 4), torch.randint(3, (16,)))
        >>> rule.credit.inverses.keys()
        dict_keys(['2'])
    """

    credit: TargetPropagation

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        weight_solver: Solver | OptimizerFactory | None = None,
        *,
        inverse: InverseFactory = mirror,
        inverse_optimizer: OptimizerFactory | None = None,
        inverse_training: str = "interleaved",
        difference: bool = True,
        step_size: float = 0.1,
        noise: float = 0.1,
        noise_halving: float | None = None,
        seed: int = 0,
        cuts: Cuts = "activation",
        nonfinite: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _checks.one_of("inverse_training", inverse_training, ("interleaved", "epoch"))
        kind = DifferenceTargetPropagation if difference else TargetPropagation
        credit = kind(
            inverse,
            step_size=step_size,
            noise=noise,
            noise_halving=noise_halving,
            optimizer=inverse_optimizer,
            seed=seed,
        )
        solver = weight_solver if isinstance(weight_solver, Solver) else Descent(weight_solver)
        if cuts == "activation":
            cuts = activation_cuts(unwrapped(model, group)[0])
        super().__init__(model, loss, credit, solver, cuts=cuts, nonfinite=nonfinite, group=group)
        self.inverse_training = inverse_training
        self.teaches_credit = inverse_training == "interleaved" and bool(credit.optimizers)

    @torch.no_grad()
    def begin_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Where `inverse_training` is `"epoch"`, train the inverses once on every batch; weights and statistics stay.

        Raises:
            NonFiniteError: if a NaN or Inf appears; the inverses are as they were before its batch.
        """
        if self.inverse_training != "epoch" or not self.credit.optimizers:
            return
        inverses = [p for inverse in self.credit.inverses.values() for p in inverse.parameters()]
        for x, y in batches:
            self.check_batch(x, y)
            saved = self._saved()
            try:
                self.credit.learn(self.chain.record(x), 1.0)
                if not is_finite(p.grad for p in inverses if p.grad is not None):
                    where = self.locate_nonfinite(x, y) or "inverse"
                    raise NonFiniteError(
                        f"{named(where)} is not finite in the inverses' training. No inverse was changed by this batch. Check "
                        "the inputs, or lower the inverses' learning rate.",
                        where=where,
                    )
                step_all(self.credit.optimizers)
            finally:
                put_back(saved)
                self.discard()

    @classmethod
    def paper_discrete(cls, model: nn.Module, loss: LossFunction, **changes: Any) -> DifferenceTargetProp:
        """Return the published settings for signs between hidden layers; `discrete_network` builds their network.

        Batches of 100, inputs in [0, 1], constant learning rates. The published step size, 27.97, multiplies the gradient
        of the batch's mean loss: 0.2797 a sample. The published local loss is `|h - target|^2`, twice the half that is
        descended here; dividing eps by 4 instead gives the same steps.

        Source: Lee et al., ECML 2015, section 3.2, and the authors' release (`disc_dtp.py`).
        """
        settings: dict[str, Any] = {
            "weight_solver": Descent(
                centered_rmsprop(0.000660055346131, eps=1e-3 / 4), output=centered_rmsprop(0.000660055346131)
            ),
            "inverse": _discrete_inverse,
            "inverse_optimizer": centered_rmsprop(0.000432831736994),
            "inverse_training": "epoch",
            "step_size": 27.965482616 / 100,
            "noise": 0.5,
            "noise_halving": 50.0,
        }
        return cls(model, loss, **{**settings, **changes})


def discrete_network(widths: Sequence[int] = (784, 500, 500, 10)) -> nn.Sequential:
    """Return the published network with signs between hidden layers: `h1 = tanh(W1 x)`, `h2 = tanh(W2 sign(h1))`, `W3 h2`.

    Weights are orthogonal (all singular values 1), biases 0, as published; they come from torch's global random state.

    Args:
        widths: of the input, the hidden layers and the output; 3 or more.

    Raises:
        ValueError: if there are fewer.
    """
    if len(widths) < 3:
        raise ValueError(f"widths must have an input, hidden layers and an output, got {tuple(widths)}.")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [Sign(), nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(nn.Flatten(), *layers[1:], nn.Linear(widths[-2], widths[-1]))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def activation_cuts(model: nn.Module) -> list[str]:
    """Return the names of the modules that end a stage if every stage ends after its nonlinearity.

    A stage takes, after its weights, all that has none, up to its last nonlinearity or pooling; dropout, reshapes and `Sign`
    after that belong to the stage above, so that codes are what the nonlinearity sent.

    Raises:
        UnsupportedModelError: if the model is no `nn.Sequential`; the message has the way out.
    """
    ends: list[str] = []
    end: str | None = None
    for name, module in flatten(model, deep=True):
        if list(module.parameters()) and not isinstance(module, NORMS):
            ends += [end] if end is not None else []
            end = name
        elif end is not None and not isinstance(module, _STAY_ABOVE):
            end = name
    return ends if end is None else [*ends, end]


_STAY_ABOVE = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd, Threshold)


def _discrete_inverse(below: Stage, stage: Stage) -> nn.Module:
    """Return `h -> tanh(V sign(h) + c)`."""
    return nn.Sequential(Sign(), mirror(below, stage))
