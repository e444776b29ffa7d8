"""What stands behind spiking layers: counts, and a loss of counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.spiking.hm2bp import precise


class SpikeCounts(nn.Module):
    """Spikes `(N, T, ...)` to counts `(N, ...)`, in single precision at least; derivatives go to every step alike."""

    def forward(self, spikes: Tensor) -> Tensor:
        return precise(spikes).sum(1)


class SpikeCountLoss(nn.Module):
    """Half the squared distance of counts `(N, classes)` from a target for the label and a smaller one for the others.

    Args:
        target: count of the label's neuron.
        off: count of the others.
        margin: distance within which there is no error.

    Raises:
        ValueError: unless 0 <= off < target and margin >= 0.

    Source: Jin, Zhang & Li, NeurIPS 2018, equation 10, with the dead zone of their code.
    """

    def __init__(self, target: float = 10.0, off: float = 1.0, margin: float = 1.0) -> None:
        super().__init__()
        _checks.non_negative("off", off)
        _checks.non_negative("margin", margin)
        if not target > off:
            raise ValueError(f"target must be larger than off, got {target!r} and {off!r}.")
        self.target, self.off, self.margin = target, off, margin

    def forward(self, counts: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch.

        Raises:
            ValueError: unless counts are `(N, classes)` and labels `(N,)` whole numbers.
        """
        if counts.ndim != 2 or labels.shape != counts.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"A SpikeCountLoss takes counts (N, classes) and labels (N,) of whole numbers, got {tuple(counts.shape)} and "
                f"{tuple(labels.shape)} of {labels.dtype}; SpikeCounts makes counts of spikes (N, T, classes)."
            )
        counts = precise(counts)
        wanted = torch.full_like(counts, self.off)
        wanted.scatter_(1, labels.long()[:, None], self.target)
        error = counts - wanted
        # Inside the margin the derivative is 0; outside it is the whole distance, as the authors' code has it.
        inside = error.abs() <= self.margin
        return 0.5 * error.masked_fill(inside, 0.0).square().sum() / len(counts)
