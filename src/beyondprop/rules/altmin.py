"""Online alternating minimization: AM-SGD, AM-Adam and AM with memory.

Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", ICML 2019,
arXiv 1806.09077. Algorithm 2.1 here:

| paper | here |
|---|---|
| encodeInput | `Chain.record`: forward pass, every penalty is 0 |
| updateCodes, Problems (4) and (5) | `credit.Codes`, one sweep, last code first, in delta form |
| updateWeights, AM-SGD / AM-Adam | `solvers.Descent` |
| updateMemory, AM-mem | `solvers.Memory` |
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from beyondprop.credit import Codes, code_solvers
from beyondprop.credit.codes import CodeSolver
from beyondprop.credit.damping import Damping
from beyondprop.optim.factories import OptimizerFactory
from beyondprop.rules.local import LocalRule
from beyondprop.solvers import Descent, Solver
from beyondprop.stages.chain import Cuts
from beyondprop.stages.losses import LossFunction


class AltMin(LocalRule):
    """Online alternating minimization over codes (pre-activations) and weights.

    Args:
        model: `nn.Sequential`, or any module with `cuts` naming its blocks; it stays yours and is trained in place.
        loss: `loss(output, y)`, mean or sum over the batch.
        weight_solver: a solver, or an optimizer factory for `Descent`; default Adam, lr 3e-3, one step.
        code_solver: `"fitted"` (a line search that is exact in every 20th step), `"line_search"`, `"gradient"` (the exact
            backpropagation limit), `"cg"`, `"exact"` or a function.
        damping, mu, mu_growth, mu_limit, normalize: of `credit.Codes`.
        code_l1: lambda_C >= 0, sparsity of the codes; `l1` of `credit.Codes`.
        weight_inputs: `"old"` (parallel stages) or `"new"` (the published order).
        cuts: where codes live; see `Chain`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> rule = AltMin(model, nn.CrossEntropyLoss())
        >>> result = rule.step(torch.randn(16, 4), torch.randint(3, (16,)))
        >>> result.output.shape
        torch.Size([16, 3])
    """

    credit: Codes

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        weight_solver: Solver | OptimizerFactory | None = None,
        *,
        code_solver: str | CodeSolver = "fitted",
        damping: Damping | None = None,
        mu: float = 1.0,
        mu_growth: float = 1.0,
        mu_limit: float = float("inf"),
        normalize: bool = True,
        code_l1: float = 0.0,
        weight_inputs: str = "old",
        cuts: Cuts = "linear",
        nonfinite: str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        growth: dict[str, float] = {"mu": mu, "mu_growth": mu_growth, "mu_limit": mu_limit}
        credit = Codes(code_solver, damping=damping, normalize=normalize, l1=code_l1, **growth)
        solver = weight_solver if isinstance(weight_solver, Solver) else Descent(weight_solver)
        super().__init__(
            model, loss, credit, solver, cuts=cuts, weight_inputs=weight_inputs, nonfinite=nonfinite, group=group
        )

    @classmethod
    def paper_fc(cls, model: nn.Module, loss: LossFunction, **changes: Any) -> AltMin:
        """Return the published settings for fully-connected nets (BatchNorm nets, batch 200, 50 epochs).

        Five Nesterov code steps of 0.3, mu 0.003, weights after codes with the new codes as inputs, Adam 0.008 (halved
        every 8 epochs: attach a scheduler). Codes are deltas here, and BatchNorm's statistics are updated once a step. The
        published penalties are means over batch and features, which shrink a delta to 6e-4 of its size a layer with 100
        units, to 1e-4 with 500: with two hidden layers all train, with eight the lowest gradients fall below Adam's eps.
        The watchdog then says so; the default settings have no such limit.
        """
        settings: dict[str, Any] = {
            "code_solver": code_solvers.momentum(5, 0.3),
            "mu": 0.003,
            "normalize": False,
            "weight_inputs": "new",
            "weight_solver": partial(torch.optim.Adam, lr=0.008),
        }
        return cls(model, loss, **{**settings, **changes})

    @classmethod
    def paper_lenet(cls, model: nn.Module, loss: LossFunction, **changes: Any) -> AltMin:
        """Return the published settings for LeNet-5 (batch 128, 10 epochs).

        As `paper_fc`, with one code step of size 1, mu 0.01 growing by 1.1 an epoch to 1.5, Adam 0.002.
        """
        settings: dict[str, Any] = {
            "code_solver": code_solvers.momentum(1, 1.0, momentum=0.0, mu_below=True),
            "mu": 0.01,
            "mu_growth": 1.1,
            "mu_limit": 1.5,
            "weight_solver": partial(torch.optim.Adam, lr=0.002),
        }
        return cls.paper_fc(model, loss, **{**settings, **changes})

    @classmethod
    def paper_binary(cls, model: nn.Module, loss: LossFunction, **changes: Any) -> AltMin:
        """Return the published settings for nets with binary units: as `paper_fc`, with ten code steps.

        The units' backward (straight-through estimation, in the published release) is the model's own.
        """
        return cls.paper_fc(model, loss, **{"code_solver": code_solvers.momentum(10, 0.3), **changes})
