"""One code's problem, and the small arithmetic on samples that it and its solvers take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from beyondprop.stages import LossPoint, Pullback


@dataclass(slots=True)
class CodeProblem:
    """One code's quadratic problem: `min_d -<gradient, d> + <J d, H J d> / 2 + damping |d|^2 / 2`, sample by sample.

    Attributes:
        stage: the stage above the code, linearised at it (J).
        delta: how the stage above should change at its output; for the last one minus the gradient of the loss.
        gradient: `J^T delta`.
        damping: weight of the code's distance from what the stage below produced: r, or mu for the top code. A number, or a
            0-d tensor where r is relative.
        loss: the loss, whose Hessian is H, for the top code; None (H = I) for the others.
        normalize: whether the solution shall be, averaged over the batch, as long as the gradient.
        mu: weight of the top code's penalty, told to all codes.
        image: `J gradient`, where it is known; `pushed` returns it.
        group: process group whose ranks have parts of the batch; means are over all of it.
    """

    stage: Pullback
    delta: Tensor
    gradient: Tensor
    damping: float | Tensor
    loss: LossPoint | None
    normalize: bool = False
    mu: float = 1.0
    image: Tensor | None = None
    group: dist.ProcessGroup | None = None

    @property
    def share(self) -> float:
        """This rank's share of the batch's samples; 1 without a group."""
        if self.group is None:
            return 1.0
        total = self.gradient.new_tensor(float(len(self.gradient)), dtype=torch.float64)
        return len(self.gradient) / float(summed(total, self.group))

    def pushed(self) -> Tensor:
        """Return `J gradient`, shape of `delta`, of the gradient as it was given."""
        if self.image is None:
            self.image = self.stage.push(self.gradient, gated=True)
        return self.image

    def curve(self, image: Tensor) -> Tensor:
        """Return `H image` for an output tangent."""
        return image if self.loss is None else self.loss.hessian(image)

    def curvature(self, image: Tensor) -> Tensor:
        """Return `image^T H image` per sample, `(N,)`."""
        return square_norm(image) if self.loss is None else self.loss.curvature(image)

    def keep_norm(self, d: Tensor) -> Tensor:
        """Return `d`, where `normalize` asks for it scaled to the mean length of the gradient over the batch."""
        if not self.normalize:
            return d
        length, kept = square_norm(d).sqrt_().sum(), square_norm(self.gradient).sqrt_().sum()
        length, kept = summed(torch.stack([length, kept]), self.group).unbind()
        return d * (kept / length.clamp_min(tiny(d)))


CodeSolver = Callable[[CodeProblem], Tensor]
"""Maps a problem to a delta of the shape of `problem.gradient`."""


def summed(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return sums over this rank's samples as those over all ranks', in place."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def square_norm(values: Tensor) -> Tensor:
    """Return the squared norm of every sample, `(N,)`; in float32 at least, as float16 ends at 65504."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(flat(values), dim=1, dtype=wide).square_()


def flat(values: Tensor) -> Tensor:
    """Return every sample's values in one row, `(N, ...)` to `(N, n)`; a sample of one number may be `(N,)`."""
    return values if values.ndim == 2 else values.reshape(len(values), -1)


def per_sample(factors: Tensor, values: Tensor) -> Tensor:
    """Reshape `(N,)` (or 0-d) factors to multiply `values` `(N, ...)`."""
    return factors.unsqueeze(-1) if values.ndim == 2 else factors.view(-1, *([1] * (values.ndim - 1)))


def tiny(values: Tensor) -> float:
    """Return the smallest normal number of the dtype: a guard against 0 / 0."""
    return torch.finfo(values.dtype).tiny
