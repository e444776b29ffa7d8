"""LocoProp under the launchers that people have, in one process and in two: equal to the plain loop, or refused by name.

    pip install lightning accelerate transformers
    python benchmarks/doors/launchers.py            # one process
    torchrun --standalone --nproc-per-node=2 benchmarks/doors/launchers.py

Each launcher trains the same small net on the same rows in float64, the rows of a batch dealt to the processes in turn.
Printed is how far the weights are from those of a plain loop over whole batches in one process, and how far the processes
are apart.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from beyondprop import LocoProp

RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
BATCH, STEPS = 32, 6
SETTINGS: dict[str, Any] = {"lr": 1e-3, "target_lr": 1.0, "local_steps": 3, "loss": "matching"}


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return the net and the rows, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    return model, torch.randn(BATCH * STEPS, 8, dtype=torch.float64), torch.randint(3, (BATCH * STEPS,))


def plain(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Train by a loop as users write it."""
    optimizer = LocoProp(model, **SETTINGS)
    for rows, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        optimizer.zero_grad()
        cross_entropy(model(rows), labels).backward()
        optimizer.step()


def by_ddp(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Train by DistributedDataParallel, the optimizer on the wrapper; one process has none."""
    if RANKS == 1:
        plain(model, x, y)
        return
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = LocoProp(wrapped, **SETTINGS)
    for rows, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        optimizer.zero_grad()
        cross_entropy(wrapped(rows[RANK::RANKS]), labels[RANK::RANKS]).backward()
        optimizer.step()


def by_lightning(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Train by Lightning's automatic optimization."""
    import lightning  # pyright: ignore[reportMissingImports]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return LocoProp(self.net, **SETTINGS)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=RANKS, strategy="ddp" if RANKS > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(x, y), BATCH // RANKS))


def by_accelerate(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Train by accelerate."""
    from accelerate import Accelerator, DataLoaderConfiguration  # pyright: ignore[reportMissingImports]

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader: Any = DataLoader(TensorDataset(x, y), BATCH)
    wrapped, optimizer, loader = accelerator.prepare(model, LocoProp(model, **SETTINGS), loader)
    for rows, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(wrapped(rows), labels))
        optimizer.step()


def by_trainer(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Train by the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments  # pyright: ignore[reportMissingImports]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(rows)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    rows = [{"rows": row, "labels": label} for row, label in zip(x, y, strict=True)]
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH // RANKS, num_train_epochs=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    net = Net()
    optimizer = LocoProp(model, **SETTINGS)
    InOrder(model=net, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]


LAUNCHERS: dict[str, Callable[[nn.Sequential, Tensor, Tensor], None]] = {
    "DistributedDataParallel": by_ddp,
    "Lightning": by_lightning,
    "accelerate": by_accelerate,
    "transformers' Trainer": by_trainer,
}


def vector(model: nn.Module) -> Tensor:
    """Return all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def apart(mine: Tensor) -> float:
    """Return how far the processes' vectors are from each other."""
    if RANKS == 1:
        return 0.0
    every = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(every, mine)
    return max(float((other - every[0]).abs().max()) for other in every)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, x, y = problem()
    whole = copy.deepcopy(start)
    plain(whole, x, y)
    moved = float((vector(whole) - vector(start)).norm())
    if RANKS > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    for name, launch in LAUNCHERS.items():
        model = copy.deepcopy(start)
        try:
            launch(model, x, y)
        except Exception as error:  # a refusal: what it says is the result
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            off = float((vector(model) - vector(whole)).norm()) / moved
            text = f"off by {off:.1e} of the way, processes apart by {apart(vector(model)):.1e}"
        if RANK == 0:
            print(f"{name:24} {RANKS} process{'es' * (RANKS > 1)}: {text}", flush=True)


if __name__ == "__main__":
    main()
