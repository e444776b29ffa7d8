"""The published code optimizer and order of updates against a literal implementation that stores codes whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SGD, assignments, blobs, difference, mlp, relative
from torch import Tensor, nn

from beyondprop import AltMin, Codes
from beyondprop.credit import code_solvers


class _Absolute:
    """The authors' release, literally, in float64: codes stored whole, means over batch and features, autograd."""

    def __init__(self, model: nn.Sequential, mu: float, steps: int, lr: float) -> None:
        self.stages = [model[:1], *[model[i : i + 2] for i in range(1, len(model), 2)]]
        self.mu, self.steps, self.lr = mu, steps, lr

    def codes(self, x: Tensor, y: Tensor, loss: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        initial = [x]
        for stage in self.stages:
            initial.append(stage(initial[-1]).detach())
        moved = [c.clone() for c in initial]
        for level in range(len(self.stages) - 1, 0, -1):
            code = nn.Parameter(initial[level].clone())
            optimizer = torch.optim.SGD([code], lr=self.lr, momentum=0.9, nesterov=True)
            for _ in range(self.steps):
                output = self.stages[level](code)
                above = (
                    loss(output, y) / self.mu if level == len(self.stages) - 1 else F.mse_loss(output, moved[level + 1])
                )
                code.grad = torch.autograd.grad(above + F.mse_loss(code, initial[level]), code)[0]
                optimizer.step()
            moved[level] = code.detach()
        return initial, moved


@pytest.mark.parametrize("steps", [1, 5])
def test_momentum_is_the_published_optimizer_where_the_net_is_linear_between_cuts(steps: int) -> None:
    model = mlp(6, 5, 7, 4, 3, activation="identity").double()
    x, y = blobs(8, dtype=torch.float64)
    target = F.one_hot(y, 3).double()
    initial, moved = _Absolute(model, 0.3, steps, 0.3).codes(x, target, nn.MSELoss())
    credit = Codes(code_solvers.momentum(steps, 0.3), mu=0.3, normalize=False)
    found = assignments(model, nn.MSELoss(), credit, x, target)[1:]
    for a, level in zip(found, (3, 2, 1), strict=True):
        assert relative(a.delta, moved[level] - initial[level]) < 1e-9  # the literal code loses digits, ours does not


def test_the_published_order_fits_weights_to_new_codes() -> None:
    """Weights after codes: the output layer on the new top code, the others on the updated codes below."""
    model = mlp(6, 5, 4, 3, activation="identity").double()
    x, y = blobs(8, dtype=torch.float64)
    target = F.one_hot(y, 3).double()
    literal = _Absolute(model, 0.3, 5, 0.3)
    _, moved = literal.codes(x, target, nn.MSELoss())
    expected = []
    for level, stage in enumerate(literal.stages):
        output = stage(moved[level])
        if level + 1 < len(literal.stages):  # the release's MSE, times a half, as a sum over features
            local = 0.5 * (output - moved[level + 1]).square().sum(1).mean()
        else:
            local = F.mse_loss(output, target)
        expected += torch.autograd.grad(local, list(stage.parameters()))
    rule = AltMin(
        model,
        nn.MSELoss(),
        SGD,
        code_solver=code_solvers.momentum(5, 0.3),
        mu=0.3,
        normalize=False,
        weight_inputs="new",
    )
    rule.backward(x, target)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert difference(gradients, expected) < 1e-10


def test_features_mean_only_rescales_the_problem() -> None:
    model = mlp(6, 5, 3).double()
    x, y = blobs(1, dtype=torch.float64)
    summed = assignments(
        model, nn.CrossEntropyLoss(), Codes(code_solvers.momentum(1, 1.0, features_mean=False), normalize=False), x, y
    )
    published = assignments(model, nn.CrossEntropyLoss(), Codes(code_solvers.momentum(1, 1.0), normalize=False), x, y)
    torch.testing.assert_close(summed[1].delta, published[1].delta)  # one sample, one step: the loss' gradient over mu
