"""Two processes whose `Credited` differ, in their batches or in what they are: as torch has it, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CE
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from beyondprop import (
    Codes,
    Credit,
    Credited,
    DifferenceTargetPropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    RelativeDamping,
    UnsupportedModelError,
)

STEPS = 3
FIRST = 16  # rows of the first rank, of 24
IN_PROPORTION: dict[str, Callable[[], Credit]] = {
    "line_search": Codes,
    "unnormalized": lambda: Codes(normalize=False),
    "relative": lambda: Codes(damping=RelativeDamping(2.0)),
    "fitted": lambda: Codes("fitted"),
    "cg": lambda: Codes("cg"),
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
}
"""Credits to whom a mean of two means is a weighted sum over samples."""
BY_THEMSELVES: dict[str, Callable[[], Credit]] = {
    "dtp": lambda: DifferenceTargetPropagation(noise=0.0),
    "sparse": lambda: Codes(l1=1e-3, normalize=False),
}
"""Credits whose deltas are no multiples of the loss: each rank has those of its own mean."""
DIFFERENT: dict[str, tuple[Callable[[int], Credited], str]] = {
    "credits": (
        lambda rank: Credited(_net(), "fa" if rank else "dfa", CE),
        "the credit is DirectFeedbackAlignment on the first rank and FeedbackAlignment on rank 1",
    ),
    "settings": (
        lambda rank: Credited(_net(), Codes(mu=1.0 + rank), CE),
        "mu is 1.0 on the first rank and 2.0 on rank 1",
    ),
    "damping": (
        lambda rank: Credited(_net(), Codes(damping=RelativeDamping(2.0) if rank else None), CE),
        "damping is None on the first rank and RelativeDamping",
    ),
    "solvers": (lambda rank: Credited(_net(), Codes("cg" if rank else "line_search"), CE), "solver is line_search on"),
    "cuts": (
        lambda rank: Credited(_net(), "am", CE, cuts=["2", "4"] if rank else "linear"),
        "the number of stages is 3 on the first rank and 2 on rank 1",
    ),
    "layers": (
        lambda rank: Credited(_net(nn.ReLU if rank else nn.Tanh), "am", CE),
        "stage 1 is AffineStage.*Tanh.* on the first rank and AffineStage.*ReLU",
    ),
}


def _net(middle: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), middle(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(24, 6, generator=generator, dtype=torch.float64), torch.arange(24) % 3


def _trained(model: nn.Module, backward: Callable[[], object]) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _of_rank(model: nn.Module, rows: slice) -> Tensor:
    wrapped, (x, y) = DistributedDataParallel(model), _batch()
    return _trained(model, lambda: CE(wrapped(x[rows]), y[rows]).backward())


class Checkpointed(nn.Module):
    """A layer, unless it is `alone`, and a `Credited` in a checkpoint, or not in one where `reentrant` is None."""

    def __init__(self, credit: Credit, reentrant: bool | None, *, alone: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = Credited(_net(), credit, CE), reentrant
        self.first = nn.Identity() if alone else nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


def _refused(run: Callable[[], object]) -> str:
    try:
        run()
    except UnsupportedModelError as error:
        return str(error)
    return "not refused"


def _join(rank: int, credit: str) -> None:
    model, (x, y) = Credited(_net(), credit, CE), _batch()
    wrapped = DistributedDataParallel(model)
    with wrapped.join():
        for _ in range(2 + rank):
            CE(wrapped(x), y).backward()


def _of_another_pass(rank: int) -> list[Tensor]:
    """Return the gradients of a batch of all ranks, between whose passes one of this rank alone came."""
    model, (x, y) = Credited(_net(), "am", CE), _batch()
    wrapped = DistributedDataParallel(model)
    loss = CE(wrapped(x[rank::2]), y[rank::2])
    torch.autograd.grad(CE(model(x[:5] + rank), y[:5]), list(model.parameters()))
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own, half = slice(None, FIRST) if rank == 0 else slice(FIRST, None), slice(rank, None, 2)
    found = {
        "unequal": {
            n: _of_rank(Credited(_net(), make(), CE), own) for n, make in (IN_PROPORTION | BY_THEMSELVES).items()
        },
        "checkpointed": {
            (name, *how): _of_rank(Checkpointed(IN_PROPORTION[name](), how[0], alone=how[1]), half)
            for name in ("line_search", "relative", "fa")
            for how in ((False, False), (False, True), (True, False))  # reentrant ones ask for a gradient at the input
        },
        "different": {
            name: _refused(lambda make=make: _of_rank(make(rank), half)) for name, (make, _) in DIFFERENT.items()
        },
        "join": [_refused(lambda credit=credit: _join(rank, credit)) for credit in ("am", "fa")],
        "inside": _refused(
            lambda: Credited(nn.Sequential(DistributedDataParallel(nn.Linear(6, 6)), nn.Linear(6, 3)), "fa")
        ),
        "between": _of_another_pass(rank),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_that_differ(tmp_path: Path) -> None:
    mp.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x, y = _batch()

    def near(found: Tensor, right: Tensor, name: str) -> None:
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12, msg=name)

    for name, make in (IN_PROPORTION | BY_THEMSELVES).items():
        model = Credited(_net(), make(), CE)

        def joint(model: nn.Module = model) -> None:
            output = model(x)
            ((CE(output[:FIRST], y[:FIRST]) + CE(output[FIRST:], y[FIRST:])) / 2).backward()

        def one_by_one(model: nn.Module = model) -> None:
            for rows in (slice(None, FIRST), slice(FIRST, None)):
                (CE(model(x[rows]), y[rows]) / 2).backward()

        near(first["unequal"][name], _trained(model, joint if name in IN_PROPORTION else one_by_one), name)
    for name, reentrant, alone in first["checkpointed"]:
        model = Checkpointed(IN_PROPORTION[name](), None, alone=alone)
        right = _trained(model, lambda model=model: CE(model(x), y).backward())
        near(first["checkpointed"][name, reentrant, alone], right, f"{name}, {reentrant}, {alone}")
    model = Credited(_net(), "am", CE)
    CE(model(x), y).backward()
    for g, p in zip(first["between"], model.parameters(), strict=True):
        assert p.grad is not None
        near(g, p.grad, "a pass between")
    for found in (first, second):
        for name, (_, message) in DIFFERENT.items():
            head, *rest = message.split(".*")
            assert f"The ranks' credits are not the same: {head}" in found["different"][name]
            assert all(part in found["different"][name] for part in rest)
        for text in found["join"]:
            assert "need equally many batches: DistributedDataParallel.join lets some run out" in text
        assert "Module '0' is wrapped (DistributedDataParallel)" in found["inside"]
    for name in first["unequal"]:
        assert torch.equal(first["unequal"][name], second["unequal"][name]), name
