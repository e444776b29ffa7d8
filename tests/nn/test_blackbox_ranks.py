"""Black boxes in several processes: what the ranks compute is the step of the joint batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from boxes import Counted, Noisy, Smooth, far, points, random_pattern
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beyondprop import AltMin, Descent, FeedbackAlignment, LocalRule
from beyondprop.nn import BlackBox

MASK = random_pattern(6, 8, 3)
SMOOTH = Smooth(MASK)


def _box(x: np.ndarray) -> np.ndarray:
    return SMOOTH(x)


def _model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    box = BlackBox(options.pop("box", _box), **{"pattern": MASK, **options})
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), box, nn.Linear(6, 3)).double()


def _total(model: nn.Sequential) -> int:
    layer = model[2]
    assert isinstance(layer, BlackBox)
    return layer.stats.total


def _batch(step: int) -> tuple[Tensor, Tensor]:
    return points(12, 5, step), torch.arange(12) % 3


def _plain(rows: slice, group: Any, **options: Any) -> tuple[Tensor, int]:
    """An ordinary loop, behind `DistributedDataParallel` where there are ranks."""
    inner = _model(**options)
    model = DistributedDataParallel(inner) if group else inner
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        x, y = _batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in inner.parameters()]), _total(inner)


def _rule(rows: slice, group: Any, kind: str) -> Tensor:
    model = _model()
    loss = nn.CrossEntropyLoss()
    named: dict[str, Any] = {"group": group} if group else {}
    rule = (
        AltMin(model, loss, **named)
        if kind == "am"
        else LocalRule(model, loss, FeedbackAlignment(), Descent(), **named)
    )
    for step in range(3):
        x, y = _batch(step)
        rule.step(x[rows], y[rows])
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _on_rank(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    try:
        rows = slice(6 * rank, 6 * rank + 6)
        group = dist.group.WORLD
        found = {
            "plain": _plain(rows, group),
            "found": _plain(rows, group, pattern="discover", sparsity=3),
            "am": (_rule(rows, group, "am"), 0),
            "fa": (_rule(rows, group, "fa"), 0),
        }
        torch.save(found, f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, int]]]:
    path: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_on_rank, args=(str(path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_make_the_step_of_the_joint_batch(ranks: list[dict[str, tuple[Tensor, int]]]) -> None:
    weights, total = _plain(slice(None), None)
    for found in ranks:
        assert far(found["plain"][0], weights) <= 1e-9
    assert sum(found["plain"][1] for found in ranks) == total


def test_ranks_that_find_their_patterns_themselves(ranks: list[dict[str, tuple[Tensor, int]]]) -> None:
    weights, _ = _plain(slice(None), None)
    assert torch.equal(ranks[0]["found"][0], ranks[1]["found"][0])
    assert far(ranks[0]["found"][0], weights) <= 1e-7


@pytest.mark.parametrize("kind", ["am", "fa"])
def test_rules_with_ranks(kind: str, ranks: list[dict[str, tuple[Tensor, int]]]) -> None:
    weights = _rule(slice(None), None, kind)
    assert torch.equal(ranks[0][kind][0], ranks[1][kind][0])
    assert far(ranks[0][kind][0], weights) <= 1e-7


def test_pieces_of_a_batch_are_the_batch() -> None:
    """Accumulated over micro-batches of unlike length, as launchers do."""
    whole, parts = _model(), _model()
    x, y = _batch(0)
    nn.functional.cross_entropy(whole(x), y).backward()
    for low, high in ((0, 5), (5, 11), (11, 12)):
        loss = nn.functional.cross_entropy(parts(x[low:high]), y[low:high], reduction="sum") / 12
        loss.backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert far(q.grad, p.grad) <= 1e-9


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate() -> None:
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    accelerator = Accelerator(cpu=True)
    model, twin = _model(), _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    x, y = _batch(0)
    accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
    nn.functional.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_lightning(tmp_path: Path) -> None:
    import lightning  # pyright: ignore[reportMissingImports]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    start = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    data = torch.utils.data.TensorDataset(*_batch(0))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert not torch.equal(start, torch.cat([p.detach().flatten() for p in module.parameters()]))


def test_a_data_loader_and_a_box_with_processes_of_its_own() -> None:
    """The box's pool and the loader's workers do not get in each other's way."""
    from concurrent.futures import ThreadPoolExecutor

    data = torch.utils.data.TensorDataset(*_batch(0))
    with ThreadPoolExecutor(2) as pool:
        model = _model(executor=pool)
        for x, y in torch.utils.data.DataLoader(data, 5, shuffle=True):
            nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_box_shared_by_two_nets_counts_once() -> None:
    box = Counted(SMOOTH)
    layer = BlackBox(box, pattern=MASK)
    nets = [nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(6, 1)).double() for _ in range(2)]
    loss = sum(net(points(3, 5)).square().sum() for net in nets)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert layer.plan is not None
    assert box.rows == layer.stats.total == 2 * 3 * (1 + layer.plan.calls)


def test_a_generator_makes_noise_repeatable() -> None:
    """Random directions come from torch's global generator, or from that of the layer."""
    noisy = Noisy(SMOOTH, 0.0)
    grads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        x = points(3, 8).requires_grad_()
        BlackBox(noisy, method="spsa", probes=2)(x).sum().backward()
        grads.append(x.grad)
    own = []
    for seed in (1, 1, 2):
        torch.manual_seed(99)
        x = points(3, 8).requires_grad_()
        layer = BlackBox(noisy, method="spsa", probes=2, generator=torch.Generator().manual_seed(seed))
        layer(x).sum().backward()
        own.append(x.grad)
    for each in (grads, own):
        assert torch.equal(each[0], each[1])  # type: ignore[arg-type]
        assert not torch.equal(each[0], each[2])  # type: ignore[arg-type]
