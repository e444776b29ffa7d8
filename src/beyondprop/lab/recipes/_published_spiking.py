"""Spiking nets on MNIST as they were published: T = 400, image by image, with the regulariser and the weights of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import data
from beyondprop.lab.comparing.member import seeded
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes._drawing import OURS, panels
from beyondprop.lab.recipes._kept import Kept
from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from beyondprop.lab.runs.context import deferred_interrupt
from beyondprop.nn.spiking import (
    CubaLIF,
    PoissonEncoder,
    SpikeCountLoss,
    SpikeCounts,
    SpikingLayer,
    SpikingSumPool2d,
    exponential_penalty,
)

STEPS, MAX_RATE = 400, 1.0 / 5.5
RATE = 1e-3
SEED = 0
CHECKED, TESTED = 1000, 100
"""Images between two checkpoints, and images at a time in a test."""

_AS_PUBLISHED: dict[str, Any] = {
    "kernel": "continuous",
    "silent": "reference",
    "silent_ratio": 1.0,
    "slope": "published",
}


@dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        build: returns the layers between the encoder and the counts; they are given `(N, T, 1, 28, 28)`.
        sharpness: of the regulariser; None: there is none.
        decay: the learning rate's divisor by the epochs that are over.
        distort: makes another image of an image `(1, 28, 28)`; None: images are as they are, and their trains are drawn once.
    """

    build: Callable[[], nn.Sequential]
    sharpness: float | None
    decay: Callable[[int], float]
    distort: Callable[[Tensor, torch.Generator], Tensor] | None = None


def neuron(threshold: float) -> CubaLIF:
    """Return the published neuron."""
    return CubaLIF(tau_mem=64.0, tau_syn=8.0, threshold=threshold, refractory=2)


def layer(op: nn.Linear | nn.Conv2d, threshold: float, bound: float, *, is_last: bool = False) -> SpikingLayer:
    """Return a published layer: weights are uniform in +- bound; the last one inhibits, and is told its target."""
    nn.init.uniform_(op.weight, -bound, bound)
    more: dict[str, Any] = {"lateral": 1.0, "injected": 35} if is_last else {}
    return SpikingLayer(op, neuron(threshold), **_AS_PUBLISHED, **more)


def pool(threshold: float) -> SpikingSumPool2d:
    """Return a published pooling of 2x2."""
    return SpikingSumPool2d(2, neuron(threshold))


def train(context: Context, published: Published, epochs: int, images: int | None, tests: int) -> list[dict[str, Any]]:
    """Train, and return for every epoch the accuracy on images in training and on test images, in percent.

    Args:
        context: where it is kept; a training that was stopped goes on from the last 1,000 images.
        published: what is trained.
        epochs: to train.
        images: of each epoch; None: all.
        tests: images of the test, the first ones.
    """
    kept = Kept(context.out / "epochs.json", {"images": images, "tests": tests, "steps": STEPS})
    found = data.load("mnist", standardize=False)
    x, y = found.x_train[:images], found.y_train[:images]
    with seeded(SEED, "cpu"):
        net = nn.Sequential(
            PoissonEncoder(STEPS, MAX_RATE, generator=torch.Generator()), *published.build(), SpikeCounts()
        )
        training = _Training(context, published, net, x, y)
        rows = []
        for epoch in range(epochs):

            def measure(epoch: int = epoch) -> dict[str, Any]:
                trained = training.epoch(epoch)
                tested = 100 * _accuracy(net, found.x_test[:tests], found.y_test[:tests])
                context.say(f"epoch {epoch + 1}: training {trained:.2f} %, test {tested:.2f} %")
                return {"epoch": epoch + 1, "training": trained, "test": tested, "train_curve": list(training.curve)}

            rows.append(kept.get(str(epoch + 1), measure))
    return rows


class _Training:
    """Weights, moments and the weights of samples, with a checkpoint of them."""

    def __init__(self, context: Context, published: Published, net: nn.Sequential, x: Tensor, y: Tensor) -> None:
        self.context, self.published, self.net, self.x, self.y = context, published, net, x, y
        self.loss = SpikeCountLoss(target=35.0, off=5.0, margin=5.0)
        self.optimizer = torch.optim.Adam(net.parameters(), RATE, fused=True)
        self.importance = torch.ones(len(x))
        self.right = torch.zeros(len(x))
        self.curve: list[float] = []
        self.file = context.out / "training.safetensors"
        self.at = (0, 0)
        if self.file.is_file():
            self._restore(load_checkpoint(self.file))

    def epoch(self, epoch: int) -> float:
        """Train to the end of an epoch; return the share of images that were right, in percent."""
        if self.at[0] != epoch and self.at != (epoch - 1, len(self.x)):
            raise ValueError(
                f"{str(self.file)!r} does not lead to epoch {epoch + 1}; put it back, or remove {str(self.file.parent)!r}."
            )
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch)).tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = RATE / self.published.decay(epoch)
        first = self.at[1] if self.at[0] == epoch else 0
        with deferred_interrupt() as interrupted:
            for done, index in enumerate(order[first:], first + 1):
                self._learn(index, epoch)
                if done % CHECKED == 0 or done == len(order):
                    recent = order[max(0, done - CHECKED) : done]
                    self.curve.append(100 * float(self.right[recent].double().mean()))
                    self.context.say(
                        f"epoch {epoch + 1}: {done} of {len(order)} images, {self.curve[-1]:.1f} % of the last"
                    )
                if done == len(order):
                    self._weigh()
                if done % CHECKED == 0 or done == len(order) or interrupted():
                    self.at = (epoch, done)
                    self._save()
                if interrupted():
                    raise KeyboardInterrupt
        return 100 * float(self.right.double().mean())

    def _learn(self, index: int, epoch: int) -> None:
        image, label = self.x[index], self.y[index : index + 1]
        encoder = self.net[0]
        assert isinstance(encoder, PoissonEncoder)
        assert encoder.generator is not None
        if self.published.distort is None:
            encoder.generator.manual_seed(index)  # the trains of an image are the same in every epoch
        else:
            encoder.generator.manual_seed(index + (epoch + 1) * len(self.x))
            image = self.published.distort(image, encoder.generator)
        counts = self.net(image[None])
        loss = self.importance[index] * self.loss(counts, label)
        if self.published.sharpness is not None:
            loss = loss + exponential_penalty(self.net, sharpness=self.published.sharpness)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.right[index] = float(counts.argmax() == label)

    def _weigh(self) -> None:
        """Give more weight to what was wrong, by how much of its class was."""
        for label in self.y.unique():
            own = self.y == label
            wrong = own & (self.right == 0)
            share = float(self.importance[wrong].sum() / self.importance[own].sum())
            self.importance[wrong] *= math.exp(share / 20.0)

    def _save(self) -> None:
        tree = {
            "at": list(self.at),
            "net": dict(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "importance": self.importance,
            "right": self.right,
            "curve": self.curve,
        }
        save_checkpoint(self.file, tree)

    def _restore(self, tree: dict[str, Any]) -> None:
        self.net.load_state_dict(tree["net"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.importance, self.right, self.curve = tree["importance"], tree["right"], tree["curve"]
        self.at = (tree["at"][0], tree["at"][1])


@torch.no_grad()
def _accuracy(net: nn.Sequential, x: Tensor, y: Tensor) -> float:
    encoder = net[0]
    assert isinstance(encoder, PoissonEncoder)
    assert encoder.generator is not None
    encoder.generator.manual_seed(1_000_000_007)  # the same trains in every test
    parts = zip(x.split(TESTED), y.split(TESTED), strict=True)
    return sum(int((net(images).argmax(1) == labels).sum()) for images, labels in parts) / len(y)


def draw(context: Context, rows: Sequence[dict[str, Any]], images: int, label: str, theirs: Sequence[float]) -> None:
    """Draw accuracy in training, 1,000 images at a time, and on test images after each epoch beside the published ones."""
    with panels(context, size=(7, 4), xlabel="images", ylabel="%", legend=-1) as axes:
        axis, (color, line) = axes[0, 0], OURS
        curve = rows[-1]["train_curve"]
        ends = [min((i + 1) * CHECKED, len(curve) * images) for i in range(len(curve))]
        axis.plot(ends, curve, color=color, linestyle=line, label=f"{label}, on images in training")
        shown = [(row["epoch"] * images, row["test"]) for row in rows]
        axis.plot(*zip(*shown, strict=True), color="#009E73", marker="o", linestyle="none", label=f"{label}, test")
        known = [(row["epoch"] * images, value) for row, value in zip(rows, theirs, strict=False)]
        axis.plot(*zip(*known, strict=True), color="#D55E00", marker="x", linestyle="none", label="authors' log, test")
        axis.set_xlim(0)
