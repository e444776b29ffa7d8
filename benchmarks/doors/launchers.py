"""Optimizers, credit behind a backward pass and a rule under launchers that people have: equal to the plain loop, or refused.

    pip install lightning accelerate transformers skorch
    python benchmarks/doors/launchers.py            # one process
    torchrun --standalone --nproc-per-node=2 benchmarks/doors/launchers.py

Every launcher trains the same small net by its own defaults in float64. The rows that its processes saw are recorded, and a
plain loop in one process is given the same rows, those of all processes in one batch. Printed is how far the weights are
from that loop's, relative to the way that they went, how far the processes are apart, and whether the rows were those of a
loop through the data in order.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from beyondprop import AffineProjection, AltMin, Credited, LocoProp, UnsupportedModelError

RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
BATCH, STEPS = 32, 6
SETTINGS: dict[str, Any] = {"lr": 1e-3, "target_lr": 1.0, "local_steps": 3, "loss": "matching"}
LOSS = nn.CrossEntropyLoss()
CREDITED = {"alternating minimization": "am", "feedback alignment": "fa"}


@dataclass
class Trainee:
    """A net, its rows, and what trains it.

    Attributes:
        subject: a key of `SUBJECTS`.
        seen: the numbers of the rows that this process was given, by step.
    """

    subject: str
    model: nn.Module
    x: Tensor
    y: Tensor
    seen: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.subject in CREDITED:
            self.model = Credited(self.model, CREDITED[self.subject], LOSS)

    def optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return a new optimizer of `model`, the net itself or a wrapper of it."""
        model = model or self.model
        self.projection = AffineProjection(model) if self.subject == "AffineProjection" else None
        if self.subject == "LocoProp":
            return LocoProp(model, **SETTINGS)
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def project(self) -> None:
        """Do what goes between backward pass and step."""
        if self.projection is not None:
            self.projection.step()

    def rule(self) -> AltMin:
        """Return a new rule of the net."""
        return AltMin(self.model, LOSS)

    def note(self, rows: Tensor) -> None:
        """Note which rows these are."""
        self.seen.append([int((self.x == row).all(1).nonzero()) for row in rows])


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return the net and the rows, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    return model, torch.randn(BATCH * STEPS, 8, dtype=torch.float64), torch.randint(3, (BATCH * STEPS,))


def plain(own: Trainee, batches: list[list[int]]) -> None:
    """Train by a loop as users write it."""
    if own.subject == "AltMin":
        rule = own.rule()
        for batch in batches:
            rule.step(own.x[batch], own.y[batch])
        return
    optimizer = own.optimizer()
    for batch in batches:
        optimizer.zero_grad()
        LOSS(own.model(own.x[batch]), own.y[batch]).backward()
        own.project()
        optimizer.step()


def trainer_of(own: Trainee, wrapped: nn.Module) -> AltMin | torch.optim.Optimizer:
    """Return what trains `wrapped`."""
    return own.rule() if own.subject == "AltMin" else own.optimizer(wrapped)


def loop(own: Trainee, wrapped: nn.Module, trainer: AltMin | torch.optim.Optimizer) -> None:
    """Train as `plain` does, on this process's part of every batch."""
    for rows, labels in zip(own.x.split(BATCH), own.y.split(BATCH), strict=True):
        rows, labels = rows[RANK::RANKS], labels[RANK::RANKS]
        own.note(rows)
        if isinstance(trainer, AltMin):
            trainer.step(rows, labels)
            continue
        trainer.zero_grad()
        LOSS(wrapped(rows), labels).backward()
        own.project()
        trainer.step()


def by_ddp(own: Trainee) -> None:
    """Train by `DistributedDataParallel`, the optimizer on the wrapper."""
    wrapped = nn.parallel.DistributedDataParallel(own.model)
    loop(own, wrapped, trainer_of(own, wrapped))


def by_sharding(own: Trainee) -> None:
    """Train by `fully_shard` (FSDP2), the optimizer built afterwards, as its documentation says."""
    shard(own.model)
    loop(own, own.model, trainer_of(own, own.model))


def by_late_sharding(own: Trainee) -> None:
    """Train by `fully_shard`, the optimizer built before."""
    trainer = trainer_of(own, own.model)
    shard(own.model)
    loop(own, own.model, trainer)


def shard(model: nn.Module) -> None:
    """Shard the weights over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def by_lightning(own: Trainee) -> None:
    """Train by Lightning: automatic optimization, a rule by manual optimization."""
    import lightning  # pyright: ignore[reportMissingImports]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = own.model
            self.automatic_optimization = own.subject != "AltMin"

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
            own.note(batch[0])
            if self.automatic_optimization:
                return cross_entropy(self.net(batch[0]), batch[1])
            self.trained.step(*batch)
            return None

        def configure_optimizers(self) -> Any:
            if self.automatic_optimization:
                return own.optimizer()
            self.trained = own.rule()
            return None

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            own.project()

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=RANKS, strategy="ddp" if RANKS > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(own.x, own.y), BATCH // RANKS))


def by_accelerate(own: Trainee) -> None:
    """Train by accelerate."""
    from accelerate import Accelerator, DataLoaderConfiguration  # pyright: ignore[reportMissingImports]

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader: Any = DataLoader(TensorDataset(own.x, own.y), BATCH)
    if own.subject == "AltMin":
        rule = own.rule()
        _, loader = accelerator.prepare(own.model, loader)
        for rows, labels in loader:
            own.note(rows)
            rule.step(rows, labels)
        return
    wrapped, optimizer, loader = accelerator.prepare(own.model, own.optimizer(), loader)
    for rows, labels in loader:
        own.note(rows)
        optimizer.zero_grad()
        accelerator.backward(LOSS(wrapped(rows), labels))
        own.project()
        optimizer.step()


def by_trainer(own: Trainee) -> None:
    """Train by the Trainer of transformers, a rule in its `training_step`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments  # pyright: ignore[reportMissingImports]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = own.model

        def forward(self, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
            own.note(rows)
            logits = self.net(rows)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    class ByRule(InOrder):
        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any) -> Tensor:
            own.note(inputs["rows"])
            return rule.step(inputs["rows"], inputs["labels"]).loss

    class Project(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            own.project()

    rows = [{"rows": row, "labels": label} for row, label in zip(own.x, own.y, strict=True)]
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH // RANKS, num_train_epochs=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    settings: dict[str, Any] = {"model": Net(), "args": arguments, "train_dataset": rows}
    if own.subject == "AltMin":
        rule = own.rule()
        idle = torch.optim.SGD(own.model.parameters(), lr=0.0)
        ByRule(**settings, optimizers=(idle, None)).train()
    else:
        InOrder(**settings, optimizers=(own.optimizer(), None), callbacks=[Project()]).train()


def by_skorch(own: Trainee) -> None:
    """Train by skorch, which makes its optimizer of parameters alone; one process."""
    from skorch import NeuralNetClassifier  # pyright: ignore[reportMissingImports]

    class Noted(NeuralNetClassifier):
        def train_step_single(self, batch: Any, **named: Any) -> Any:
            own.note(batch[0])
            return super().train_step_single(batch, **named)

    net = Noted(
        own.model, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=0.1, optimizer__momentum=0.9, max_epochs=1,
        batch_size=BATCH, iterator_train__shuffle=False, train_split=None, verbose=0,
    )  # fmt: skip
    net.fit(own.x, own.y)
    own.model.load_state_dict(net.module_.state_dict())


LAUNCHERS: dict[str, Callable[[Trainee], None]] = {
    "Lightning": by_lightning,
    "accelerate": by_accelerate,
    "transformers' Trainer": by_trainer,
}
OF_RANKS: dict[str, Callable[[Trainee], None]] = {
    "DistributedDataParallel": by_ddp,
    "fully_shard": by_sharding,
    "fully_shard, later": by_late_sharding,
}
SUBJECTS = ("LocoProp", "AffineProjection", *CREDITED, "AltMin")


def vector(model: nn.Module) -> Tensor:
    """Return all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gathered(mine: Any) -> list[Any]:
    """Return every process's object."""
    if RANKS == 1:
        return [mine]
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, mine)
    return every


def compared(own: Trainee, start: nn.Sequential, weights: list[Tensor], seen: list[list[list[int]]]) -> str:
    """Return how the weights of all processes compare with a plain loop's over the rows that they saw."""
    batches = [[row for part in parts for row in part] for parts in zip(*seen, strict=True)]
    in_order = all(sorted(batch) == list(range(BATCH * n, BATCH * (n + 1))) for n, batch in enumerate(batches))
    plain(reference := Trainee(own.subject, copy.deepcopy(start), own.x, own.y), batches)
    right = vector(reference.model)
    off = float((weights[0] - right).norm() / (right - vector(start)).norm())
    apart = max(float((other - weights[0]).abs().max()) for other in weights)
    dealt = "in order" if in_order and len(batches) == STEPS else "in an order of its own"
    return f"off by {off:.0e}, processes apart by {apart:.0e}, rows {dealt}"


def versions() -> str:
    """Return what was tried."""
    packages = ("torch", "lightning", "accelerate", "transformers", "skorch")
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, x, y = problem()
    if RANKS > 1:
        dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for subject in SUBJECTS:
        alone = {"skorch": by_skorch} if subject in CREDITED else {}
        for name, launch in (LAUNCHERS | (OF_RANKS if RANKS > 1 else alone)).items():
            own = Trainee(subject, copy.deepcopy(start), x, y)
            try:
                launch(own)
            except UnsupportedModelError as error:
                found[f"{subject}, {name}"] = f"refused: {' '.join(str(error).split())}"
            else:
                found[f"{subject}, {name}"] = own, gathered(vector(own.model)), gathered(own.seen)
    if RANKS > 1:
        dist.destroy_process_group()  # a plain loop would be refused in a group
    if RANK == 0:
        print(f"{RANKS} process{'es' * (RANKS > 1)}, {versions()}")
    for name, result in found.items() if RANK == 0 else ():
        text = result if isinstance(result, str) else compared(result[0], start, *result[1:])
        print(f"  {name}: {text}", flush=True)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo abort now and then where a process ends in the ordinary way, with torch alone, too


if __name__ == "__main__":
    main()
