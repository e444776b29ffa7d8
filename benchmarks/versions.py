"""Step times of two versions of this library in one process: what a change of the code costs.

    git worktree add ../before COMMIT
    python benchmarks/versions.py ../before/src src [--rounds 11] [--only AltMin lenet5]

Both versions are loaded side by side and take turns; figures are medians over rounds, with quartiles, of the ratio after /
before within a round, in process CPU time.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[], object]
ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)
NAME = "beyondprop"


class Version:
    """One version of the package, loaded from a folder; `use` makes it the one that imports find."""

    def __init__(self, source: str) -> None:
        self.modules: dict[str, ModuleType] = {}
        self.use()
        sys.path.insert(0, source)
        self.package: Any = importlib.import_module(NAME)
        for name in ("AltMin", "LocoProp", "AffineProjection", "Memory"):
            getattr(self.package, name)
        try:
            self.nets: Any = importlib.import_module(f"{NAME}.lab.nets")
        except ImportError:  # before there were rooms
            self.nets = importlib.import_module(f"{NAME}.nets")
        sys.path.remove(source)
        self.modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == NAME}

    def use(self) -> None:
        """Let imports inside functions find this version."""
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
        sys.modules.update(self.modules)


@dataclass(frozen=True)
class Case:
    """A step that is timed.

    Attributes:
        build: returns the step of a version.
        steps: in a block.
    """

    build: Callable[[Version], Step]
    steps: int


def labels(form: str, shape: tuple[int, ...], rows: int, version: Version) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a net and a batch with labels, equal for all versions."""
    torch.manual_seed(0)
    return version.nets.build(form, shape, 10), torch.randn(rows, *shape), torch.randint(10, (rows,))


def images(version: Version) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the deep autoencoder and a batch of 1000 images."""
    del version
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((784, 1000, 500, 250, 30, 250, 500, 1000, 784)):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    x = torch.rand(1000, 784)
    return nn.Sequential(*layers[:-1]), x, x


def pixels(output: Tensor, x: Tensor) -> Tensor:
    """Return the binary cross-entropy, summed over pixels, mean over images."""
    return F.binary_cross_entropy_with_logits(output, x, reduction="sum") / len(x)


def altmin(version: Version, data: Callable[[Version], Any], memory: bool = False) -> Step:
    """Return a step of alternating minimization."""
    model, x, y = data(version)
    solver = version.package.Memory(lr=1.0) if memory else ADAM
    rule = version.package.AltMin(model, nn.CrossEntropyLoss(), solver)
    return lambda: rule.step(x, y)


def by_hand(version: Version, data: Callable[[Version], Any], kind: str, loss: Callable[..., Tensor]) -> Step:
    """Return a user's training step with an optimizer of the version."""
    model, x, y = data(version)
    before = None
    if kind == "projection":
        before = version.package.AffineProjection(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    else:
        steps = 5 if kind == "matching" else 10
        optimizer = version.package.LocoProp(model, lr=1e-5, loss=kind, local_steps=steps)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        if before is not None:
            before.step()
        optimizer.step()

    return step


def cases() -> dict[str, Case]:
    """Return what is timed by name."""
    grey, entropy = (1, 28, 28), nn.CrossEntropyLoss()
    small = partial(labels, "mlp:100x2:tanh", grey, 200)
    lenet = partial(labels, "lenet5", grey, 128)
    nets = {
        "mlp:100x2": (partial(labels, "mlp:100x2", grey, 200), 30),
        "mlp:500x2": (partial(labels, "mlp:500x2", grey, 128), 8),
        "lenet5": (lenet, 3),
        "resnet20": (partial(labels, "resnet20", (3, 32, 32), 32), 1),
        "rnn:100:rows": (partial(labels, "rnn:100:rows", grey, 100), 3),
    }
    found = {f"AltMin {net}": Case(partial(altmin, data=data), steps) for net, (data, steps) in nets.items()}
    found["AltMin, memory, mlp:100x2"] = Case(partial(altmin, data=nets["mlp:100x2"][0], memory=True), 10)
    for title, kind in (("LocoProp-M", "matching"), ("LocoProp-S", "squared"), ("AffineProjection", "projection")):
        found |= {
            f"{title} autoencoder": Case(partial(by_hand, data=images, kind=kind, loss=pixels), 1),
            f"{title} mlp:100x2": Case(partial(by_hand, data=small, kind=kind, loss=entropy), 10),
            f"{title} lenet5": Case(partial(by_hand, data=lenet, kind=kind, loss=entropy), 2),
        }
    return found


def ratios(case: Case, versions: tuple[Version, Version], rounds: int) -> tuple[list[float], float]:
    """Return the ratio of the second version's time to the first's in every round, and the first's seconds a step."""
    steps = []
    for version in versions:
        version.use()
        steps.append(case.build(version))
    found, seconds = [], []
    for turn in range(-1, rounds):
        took = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            versions[which].use()
            start = time.process_time()
            for _ in range(case.steps):
                steps[which]()
            took[which] = time.process_time() - start
        if turn >= 0:  # the first warms up
            found.append(took[1] / took[0])
            seconds.append(took[0] / case.steps)
    return found, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="folder with the package before the change")
    parser.add_argument("after", help="folder with the package after it")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name has one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = Version(arguments.before), Version(arguments.after)
    for name, case in cases().items():
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        found, seconds = ratios(case, versions, arguments.rounds)
        low, _, high = statistics.quantiles(found, n=4)
        ratio = f"{statistics.median(found):.3f} ({low:.3f} to {high:.3f})"
        print(f"{name:28} {ratio}, before {1e3 * seconds:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
