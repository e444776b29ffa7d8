"""What the damping of codes below blocks does to a step: gains, effective samples, angles to the gradient.

    BEYONDPROP_DATA=... python benchmarks/block_damping.py [--net resnet20 transformer:64x2] [--steps 180] [--damping 1 x4]

Trains each net on CIFAR-10 by alternating minimization at one damping, then looks at one batch at all of them. A damping
`xR` is `RelativeDamping(R)`, a number is itself. Prints:

- gain: the squared gain |J g|^2 / |g|^2 of the samples of a batch, least, median and largest, for the stage where the
  ratio of largest to least is largest, along the plain gradients;
- samples: (sum w)^2 / sum w^2 of what the samples' gradients are multiplied by on their way to the lowest stage;
- angle: between a stage's gradient and backpropagation's, the median over the stages and the largest.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import Tensor, nn

from beyondprop import AltMin, CodeProblem, RelativeDamping, alignment, data
from beyondprop.credit import code_solvers
from beyondprop.lab import nets
from beyondprop.optim.factories import adam

BATCH, SEED = 128, 0
LOSS = nn.CrossEntropyLoss()


def parsed(damping: str) -> float | RelativeDamping:
    """Read `4` or `x4`."""
    return RelativeDamping(float(damping[1:])) if damping.startswith("x") else float(damping)


def train(net: str, rows: data.Dataset, damping: str, steps: int, lr: float) -> nn.Module:
    """Return a net after a number of steps with a linear decay over twice as many."""
    torch.manual_seed(SEED)
    model = nets.build(net, rows.input_shape, rows.num_classes)
    rule = AltMin(model, LOSS, adam(lr), damping=parsed(damping))
    draw = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        for group in rule.optimizers[0].param_groups:
            group["lr"] = lr * (1 - step / (2 * steps))
        chosen = torch.randint(len(rows.x_train), (BATCH,), generator=draw)
        rule.step(rows.x_train[chosen], rows.y_train[chosen])
    return model


def look(model: nn.Module, x: Tensor, y: Tensor, damping: str) -> tuple[list[Tensor], Tensor, list[float]]:
    """Return the gains at every hidden code, the samples' weights at the lowest stage, and the stages' angles."""
    gains: list[Tensor] = []
    weights = torch.ones(len(x))

    def watching(problem: CodeProblem) -> Tensor:
        nonlocal weights
        before = code_solvers.square_norm(problem.gradient).sqrt()
        if problem.loss is None:
            gains.append(code_solvers.square_norm(problem.pushed()) / before.square())
        delta = code_solvers.line_search(problem)
        weights = weights * code_solvers.square_norm(delta).sqrt() / before
        return delta

    watching.needs_codes = False  # type: ignore[attr-defined]
    rule = AltMin(copy.deepcopy(model), LOSS, adam(0.0), damping=parsed(damping), code_solver=watching)
    rule.step(x, y)
    rule = AltMin(copy.deepcopy(model), LOSS, adam(0.0), damping=parsed(damping))
    angles = [found.angle for found in alignment(rule, x, y).values()]
    return gains, weights, angles


def main() -> None:
    """Print a line for every net, damping of the training and damping of the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", default=["resnet20", "transformer:64x2"])
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--damping", nargs="+", default=["1", "10", "100", "x1", "x4"])
    parser.add_argument("--trained-with", nargs="+", default=["1", "x4"])
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    rows = data.load("cifar10")
    x, y = rows.x_test[:BATCH], rows.y_test[:BATCH]
    for net in options.net:
        for trained_with in options.trained_with:
            model = train(net, rows, trained_with, options.steps, options.lr)
            print(f"{net}, {options.steps} steps of {options.lr:g} with damping {trained_with}")
            for damping in options.damping:
                gains, weights, angles = look(model, x, y, damping)
                widest = max(gains, key=lambda gain: float(gain.max() / gain.min()))
                low, middle, high = (float(f(widest)) for f in (torch.min, torch.median, torch.max))
                samples = float(weights.sum() ** 2 / weights.square().sum())
                print(
                    f"  damping {damping:>4}: gain {low:.2g} to {high:.2g}, median {middle:.2g}; "
                    f"{samples:.0f} of {BATCH} samples; angle {statistics.median(angles):.1f}, at most {max(angles):.1f}"
                )


if __name__ == "__main__":
    main()
