"""More than one process: weights are kept equal, or training is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from beyondprop import AffineProjection, AltMin, Backprop, LocoProp, UnsupportedModelError
from beyondprop.lab import registry

LOCOPROP: dict[str, Any] = {"lr": 1e-2, "local_steps": 3, "target_lr": 1.0}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(24, 6, generator=generator, dtype=torch.float64), torch.arange(24) % 3


def _model() -> nn.Sequential:
    torch.manual_seed(2)
    return mlp(6, 9, 3, activation="tanh").double()


def _late(wrap: bool, rows: slice, projects: bool = False) -> Tensor:
    """Train as launchers do: the optimizer is on the inner module, which is wrapped afterwards."""
    inner, (x, y) = _model(), _batch()
    before = AffineProjection(inner) if projects else None
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1) if projects else LocoProp(inner, **LOCOPROP)
    model = DistributedDataParallel(inner) if wrap else inner
    for _ in range(4):
        cross_entropy(model(x[rows]), y[rows]).backward()
        if before is not None:
            before.step()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in inner.parameters()])


def _refuse_what_is_not_averaged(x: Tensor, y: Tensor) -> None:
    """Wrappers whose backward pass the rule does not take, that hold a part of the weights, or that are gone past."""
    loss = nn.CrossEntropyLoss()
    blocks = nn.Sequential(*(DistributedDataParallel(m) if isinstance(m, nn.Linear) else m for m in _model()))
    part = nn.Sequential(DistributedDataParallel(_model()), nn.Linear(3, 3).double())
    rules = (
        AltMin(blocks, loss),
        Backprop(part, loss, lambda p: torch.optim.SGD(p, lr=0.1)),
    )
    for rule in rules:
        with pytest.raises(UnsupportedModelError, match="trains in 2 processes"):
            rule.step(x, y)
    inner = _model()
    optimizer = LocoProp(inner, **LOCOPROP)
    wrapped = DistributedDataParallel(inner)
    cross_entropy(wrapped(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    cross_entropy(inner(x), y).backward()
    with pytest.raises(UnsupportedModelError, match="past its DistributedDataParallel"):
        optimizer.step()


class _Outputs(nn.Module):
    """A loss and what it does not need, as models of transformers return them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = mlp(6, 9, 8, activation="tanh")[:2], nn.Linear(9, 3), nn.Linear(9, 2)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        logits = self.head(h)
        return {"loss": cross_entropy(logits, y), "logits": logits, "other": self.other(h)}


def _behind_outputs(x: Tensor, y: Tensor, settings: dict[str, Any]) -> dict[str, str]:
    torch.manual_seed(2)
    model = _Outputs()
    optimizer = LocoProp(model, transfer={"other": "identity"}, **LOCOPROP)
    wrapped = DistributedDataParallel(model, **settings)
    wrapped(x, y)["loss"].backward()
    optimizer.step()
    return optimizer.transfers


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = slice(rank, None, 2)
    found: dict[str, Any] = {"LocoProp": _late(True, own), "AffineProjection": _late(True, own, projects=True)}
    refused: dict[str, str] = {}
    for projects in (False, True):
        with pytest.raises(UnsupportedModelError, match="trains in 2 processes") as caught:
            _late(False, own, projects=projects)
        refused[f"projects {projects}"] = str(caught.value)
    x, y = _batch()
    for name in registry.rules.names():
        spec = registry.rules.get(name)
        rule = spec.build(mlp(6, 9, 3), nn.CrossEntropyLoss(), spec.lr)
        with pytest.raises(UnsupportedModelError, match="trains in 2 processes"):
            rule.step(x[own].float(), y[own])
    wrapped = DistributedDataParallel(_model())
    rule = Backprop(wrapped, nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.1))
    rule.step(x[own], y[own])
    found["Backprop"] = torch.cat([p.detach().flatten() for p in wrapped.parameters()])
    _refuse_what_is_not_averaged(x[own], y[own])
    for settings in ({"find_unused_parameters": True}, {"static_graph": True}):
        assert _behind_outputs(x[own], y[own], settings) == {"body.0": "tanh", "head": "softmax", "other": "identity"}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_stay_equal_or_are_refused(tmp_path: Path) -> None:
    mp.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole = {"LocoProp": _late(False, slice(None)), "AffineProjection": _late(False, slice(None), projects=True)}
    for name in ("LocoProp", "AffineProjection", "Backprop"):
        assert torch.equal(first[name], second[name]), name
    for name, expected in whole.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-12)
