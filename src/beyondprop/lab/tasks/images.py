"""Pictures as networks for small images are trained on them: centered by their mean image, cropped and mirrored at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from beyondprop import _checks, data
from beyondprop.lab.tasks.classification import Classification
from beyondprop.lab.tasks.rows import RowsTask, seed_of, shuffled

_MOST_PADDING = 1000


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AugmentedTask(RowsTask):
    """Images whose training batches are augmented; what is evaluated on is as it is.

    Every batch draws from a generator of its own, seeded by the training's seed, the epoch and the number of the batch: a
    training goes on in mid-epoch with what it would have drawn, and no net or rule draws otherwise than another.

    Attributes:
        padding: pixels of zeros on each side before a crop of the old size is taken from anywhere in it.
        flips: whether half of the images are mirrored, left to right.
    """

    padding: int = 0
    flips: bool = False

    def batches(self, epoch: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches, from number `start` on; their rows are those without augmentation."""
        drawn = seed_of(seed, epoch)
        pairs = shuffled(self.x_train, self.y_train, epoch, batch_size, seed, start)
        for number, (x, y) in enumerate(pairs, start):
            generator = torch.Generator().manual_seed(seed_of(drawn, number + 1))
            yield augmented(x, self.padding, flips=self.flips, generator=generator), y


def augmented(x: Tensor, padding: int = 0, *, flips: bool = False, generator: torch.Generator) -> Tensor:
    """Return a random crop of every image `(N, C, H, W)` on a frame of zeros, every second one mirrored.

    Args:
        x: images.
        padding: pixels of the frame on each side, >= 0.
        flips: mirror each image with probability 1/2.
        generator: on the CPU, so that all devices draw alike.

    Raises:
        ValueError: if these are no images, or `padding` is negative.
    """
    if x.ndim != 4:
        raise ValueError(f"images (N, C, H, W) are needed, got shape {tuple(x.shape)}.")
    rows, channels, height, width = x.shape
    corners = torch.randint(2 * _checks.at_least("padding", padding, 0) + 1, (2, rows, 1), generator=generator)
    columns = torch.arange(width).expand(rows, width)
    if flips:
        mirrored = torch.randint(2, (rows, 1), generator=generator).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    down, right = (corners[0] + torch.arange(height)).to(x.device), (corners[1] + columns).to(x.device)
    row, channel = (torch.arange(count, device=x.device) for count in (rows, channels))
    framed = F.pad(x, (padding,) * 4)
    return framed[row[:, None, None, None], channel[:, None, None], down[:, None, :, None], right[:, None, None, :]]


def images(rest: str, progress: data.Progress | None = None) -> RowsTask:
    """Return the task of labels for `images:DATA[:centered][:pad=N][:flip]`."""
    name, *options = (rest or "cifar10").split(":")
    _checks.one_of("data", name, data.names())
    given = {option.partition("=")[0]: option.partition("=")[2] for option in options}
    if len(given) < len(options):
        raise ValueError(f"task images: every option goes once, got {':'.join(options)!r}.")
    for key, value in given.items():
        _checks.one_of("option of task images", key, ("centered", "pad", "flip"))
        if key != "pad" and key not in options:
            raise ValueError(f"task images: {key} takes no value, got {value[:40]!r}.")
    text = given.get("pad", "0")
    if not (text.isdecimal() and text.isascii() and len(text) < 5 and int(text) <= _MOST_PADDING):
        raise ValueError(f"task images: pad=N takes a whole number of pixels up to {_MOST_PADDING}, got {text[:40]!r}.")
    centers = "centered" in given
    found = data.load(name, progress=progress, standardize=not centers)
    if len(found.input_shape) != 3 or not found.classes:
        raise ValueError(f"task images takes images with labels, got {name!r} of shape {found.input_shape}.")
    if centers:
        found = _centered(found)
    task = replace(Classification.task(found), name=":".join(["images", name, *options]), sample="image")
    if not ({"pad", "flip"} & set(given)):
        return task
    own = {field.name: getattr(task, field.name) for field in fields(task)}
    return AugmentedTask(**own, padding=int(text), flips="flip" in given)


def _centered(images: data.Dataset) -> data.Dataset:
    """Return images in [0, 1] as pixels in 0 … 255, less the mean image of the training rows.

    Source: Gomez et al., NeurIPS 2017, arXiv 1707.04585, authors' code, whose mean has the test rows in it, too.
    """
    x_train = images.x_train * 255
    mean = x_train.mean(0)
    x_test = None if images.x_test is None else (images.x_test * 255).sub_(mean)
    return replace(images, x_train=x_train.sub_(mean), x_test=x_test)
