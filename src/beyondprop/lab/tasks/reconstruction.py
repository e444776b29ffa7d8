"""Images that a network gives back: the deep autoencoder's loss."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from beyondprop import data
from beyondprop.lab.tasks.base import Metric
from beyondprop.lab.tasks.regression import LossOnly
from beyondprop.lab.tasks.rows import RowsTask

NATS = Metric("loss", "loss an image (nats)", higher_is_better=False)


class SummedCrossEntropy(nn.Module):
    """Binary cross-entropy of pixels in [0, 1], summed over an image, mean over the batch: logits `(N, pixels)`."""

    reduction = "mean"

    def forward(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return the loss, 0-d."""
        return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


class Reconstruction(LossOnly):
    """Rows whose targets are their own pixels."""

    metrics = (NATS,)

    def check(self, output: Tensor, y: Tensor) -> None:
        if output.shape != y.shape:
            raise ValueError(f"its output is (N, {', '.join(map(str, output.shape[1:]))}); the pixels are {y.shape[1]}")
        super().check(output, y)


def autoencoder(name: str, progress: data.Progress | None = None) -> RowsTask:
    """Return the task of giving back the images of a data set, `(N, ...)` in [0, 1], as logits `(N, pixels)`."""
    images = data.load(name or "digits", standardize=False, progress=progress)
    if len(images.input_shape) != 3:
        raise ValueError(f"task autoencoder takes images in [0, 1], got {name!r}; use digits, mnist or fashion-mnist.")
    pixels = math.prod(images.input_shape)
    return RowsTask(
        name=f"autoencoder:{images.name}",
        x_train=images.x_train,
        y_train=images.x_train.flatten(1),
        x_test=images.x_test,
        y_test=images.x_test.flatten(1),
        kind=Reconstruction(SummedCrossEntropy()),
        outputs=pixels,
        sample="image",
    )
