"""Credit in blocks of models of transformers, trained by their Trainer: equal to a plain loop over the same rows.

    pip install accelerate transformers
    python benchmarks/doors/in_transformers.py      # one process
    torchrun --standalone --nproc-per-node=2 benchmarks/doors/in_transformers.py

Tiny models from their configurations, in float64 and without dropout, whose masks differ by process. The rows that each
process saw are recorded, and a plain loop in one process is given the rows of all as one batch. Printed is how far the
weights are from that loop's, relative to the way that they went, how far the processes are apart, the same with activation
checkpoints, whether names are the plain model's, and in one process, whether a plain model loads what was saved, and how far
a run that resumes from a checkpoint ends from one that never stopped.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers  # pyright: ignore[reportMissingImports]
from launchers import BATCH, CREDITED, RANK, RANKS, STEPS, gathered, vector, versions
from torch import Tensor, nn

from beyondprop import CreditBlock

ROWS, TOKENS = BATCH * STEPS, 7
Rows = dict[str, Tensor]
Place = tuple[nn.Module, str, dict[str, Any]]
SIZE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> tuple[nn.Module, list[Place]]:
    """Return an encoder and its feed-forward layers, which its forward pass calls one by one."""
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **SIZE, **NO_DROPOUT)
    model = transformers.BertForSequenceClassification(config)
    layers = model.bert.encoder.layer
    return model, [p for layer in layers for p in ((layer, "intermediate", {}), (layer.output, "dense", {}))]


def vit() -> tuple[nn.Module, list[Place]]:
    """Return an encoder of images and its feed-forward blocks."""
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SIZE, **NO_DROPOUT)
    model = transformers.ViTForImageClassification(config)
    return model, [(layer, "mlp", {"cuts": "linear"}) for layer in model.vit.layers]


def gpt2() -> tuple[nn.Module, list[Place]]:
    """Return a decoder and its feed-forward blocks, whose layers are `Conv1D`."""
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2ForSequenceClassification(config)
    return model, [(layer, "mlp", {"cuts": "linear"}) for layer in model.transformer.h]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Place]]]] = {"BERT": bert, "ViT": vit, "GPT-2": gpt2}
STARTS_ANEW = ("ViT",)
"""Its Trainer does not find the plain model's own weights in a checkpoint, where they have older names."""


def built(name: str, credit: str) -> nn.Module:
    """Return a model, the same in every process, its blocks with a credit each."""
    torch.manual_seed(0)
    model, places = MODELS[name]()
    model.double()
    for owner, block, settings in places if credit else ():
        setattr(owner, block, CreditBlock(getattr(owner, block), credit, **settings))
    return model.train()


def rows_of(name: str) -> Rows:
    """Return the data set: images, or sentences of two lengths."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (ROWS,), generator=generator)
    if name == "ViT":
        return {"pixel_values": torch.randn(ROWS, 1, 8, 8, generator=generator, dtype=torch.float64), "labels": labels}
    ids = torch.randint(2, 30, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def plain(model: nn.Module, rows: Rows, batches: list[list[int]]) -> None:
    """Train by a loop as users write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        model(**{key: values[batch] for key, values in rows.items()}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def trained(model: Any, rows: Rows, folder: str, *, resume: str | None = None, **settings: Any) -> list[list[int]]:
    """Train by the Trainer for two epochs; return which rows this process saw, by step."""

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    seen: list[list[int]] = []
    key = next(iter(rows))

    def note(module: nn.Module, positional: Any, named: dict[str, Tensor]) -> None:
        del module, positional
        same = [(rows[key] == row).flatten(1).all(1) for row in named[key]]
        seen.append([int(each.nonzero()) for each in same])

    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=BATCH // RANKS, num_train_epochs=2, lr_scheduler_type="constant", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="epoch" if RANKS == 1 else "no",
        average_tokens_across_devices=False,  # it multiplies a loss that is no sum over tokens with the number of processes
        **settings,
    )  # fmt: skip
    data = [{key: values[i] for key, values in rows.items()} for i in range(ROWS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    InOrder(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train(resume_from_checkpoint=resume)
    handle.remove()
    return seen


def off(model: nn.Module, right: nn.Module, start: Tensor) -> str:
    """Return how far a model is from another, relative to the way that this one went."""
    return f"{float((vector(model) - vector(right)).norm() / (vector(right) - start).norm()):.0e}"


def is_saved_whole(model: Any, folder: str) -> bool:
    """Whether a plain model loads what the trained one saved."""
    model.save_pretrained(folder)
    found = type(model).from_pretrained(folder, dtype=torch.float64).state_dict()
    return all(torch.equal(found[key], value) for key, value in model.state_dict().items() if "._credit." not in key)


def tried(name: str, credit: str) -> str:
    """Return what was found of one model and credit."""
    rows, model = rows_of(name), built(name, credit)
    start, right, checkpointed = vector(model), copy.deepcopy(model), copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        seen = gathered(trained(model, rows, folder))
        batches = [[row for part in parts for row in part] for parts in zip(*seen, strict=True)]
        plain(right, rows, batches)
        apart = max(float((other - vector(model)).abs().max()) for other in gathered(vector(model)))
        orders = [sorted(batch) == list(range(BATCH * n, BATCH * (n + 1))) for n, batch in enumerate(batches[:STEPS])]
        text = f"off by {off(model, right, start)}, processes apart by {apart:.0e}, rows {'in order' * all(orders) or 'mixed'}"
        with tempfile.TemporaryDirectory() as other:
            trained(checkpointed, rows, other, gradient_checkpointing=True)
        text += f", checkpointed off by {off(checkpointed, right, start)}"
        names = [key for key in model.state_dict() if "._credit." not in key]
        text += f", names {'those of the plain model' if names == list(built(name, '').state_dict()) else 'others'}"
        if RANKS > 1:
            return text
        text += f", {'loads' if is_saved_whole(model, folder) else 'does not load'} into a plain model"
        if name not in STARTS_ANEW:
            resumed = built(name, credit)
            with tempfile.TemporaryDirectory() as other:
                trained(resumed, rows, other, resume=f"{folder}/checkpoint-{STEPS}")
            text += f", resumed off by {off(resumed, right, start)}"
    return text


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if RANKS > 1:
        dist.init_process_group("gloo")
    if RANK == 0:
        print(f"{RANKS} process{'es' * (RANKS > 1)}, {versions()}", flush=True)
    for name in MODELS:
        for title, credit in CREDITED.items():
            found = tried(name, credit)
            if RANK == 0:
                print(f"  {name}, {title}, transformers' Trainer: {found}", flush=True)
    if RANKS > 1:
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo abort now and then where a process ends in the ordinary way, with torch alone, too


if __name__ == "__main__":
    main()
