"""Sparse least squares by columns taken one after the other, and dropped again where they were not worth it.

One support for several systems, each with unknowns of its own: orthogonal least squares (Chen, Billings & Luo 1989) for all at
once, as in simultaneous OMP (Tropp, Gilbert & Strauss 2006). Each system has a noise of its own, too, rounding and curvature
being what they are: evidence is the likelihood ratio, a sum of logarithms, to which one large system adds no more than another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EXACT = 1e-10  # a residual below this share of a row is rounding
_TINY = 1e-300
CHUNK = 2**22  # numbers in each of the few largest temporaries: 32 MB in float64


class Selection:
    """Columns chosen for R rows at once, in up to `bound` places each.

    Args:
        probes: `(S, k, n)`, one system for each of S samples.
        values: `(S, R, k)`, of each row.
        bound: the most columns of a row, at most k - 1.

    Attributes:
        columns: `(R, bound)`.
        taken: `(R, bound)` bool: which places are in use.
        rest: `(R,)`, the squared residual, all samples together.
    """

    def __init__(self, probes: Tensor, values: Tensor, bound: int) -> None:
        self.probes, self.values, self.bound = probes, values, bound
        self.samples, self.k, self.n = probes.shape
        self.energy = values.square().sum((0, 2))
        self.floors = values.square().sum(-1) * _EXACT**2 + _TINY  # (S, R)
        self.floor = self.floors.sum(0)
        self.columns = torch.zeros(values.shape[1], bound, dtype=torch.long, device=values.device)
        self.taken = torch.zeros_like(self.columns, dtype=torch.bool)
        self.rest = self.energy.clone()

    @property
    def degrees(self) -> Tensor:
        """Values less unknowns of each row, `(R,)`."""
        return self.samples * (self.k - self.taken.sum(-1))

    def fill(self, columns: Tensor) -> Selection:
        """Take the columns `(R, bound)`, all different in a row."""
        self.columns, self.taken = columns, torch.ones_like(columns, dtype=torch.bool)
        return self

    def forward(self, noise: float = 0.0) -> Selection:
        """Take columns until `bound` of them are taken or a row is met, to rounding or to half the variance of `noise`."""
        inner = self.values @ self.probes  # of the residual with each column, (S, R, n)
        # Squared lengths of what the columns have outside the span of those taken.
        lengths = self.probes.square().sum(1).unsqueeze(1)
        least = lengths * 1e-12 + _TINY
        lengths = lengths.expand_as(inner).clone()
        rest, basis = self.values, []
        free = torch.ones(inner.shape[1:], dtype=torch.bool, device=inner.device)
        for step in range(self.bound):
            alive = rest.square().sum((0, 2)) > self.floor + 0.5 * noise**2 * self.samples * (self.k - step)
            if not bool(alive.any()):
                break
            share = inner.square() / (
                torch.maximum(lengths, least) * (rest.square().sum(-1) + self.floors).unsqueeze(-1)
            )
            scores = share.clamp_(max=1 - 1e-12).neg_().log1p_().sum(0).masked_fill_(~free, 1.0)
            choice = scores.argmin(-1)
            self.columns[:, step], self.taken[:, step] = choice, alive
            free.scatter_(1, choice.unsqueeze(1), False)
            direction = self.probes[:, :, choice].mT  # (S, R, k)
            for old in basis * 2:  # twice, for orthogonality to rounding
                direction = direction - (direction * old).sum(-1, keepdim=True) * old
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(_TINY) * alive.view(1, -1, 1)
            basis.append(direction)
            share = (direction * rest).sum(-1, keepdim=True)
            rest = rest - share * direction
            along = direction @ self.probes
            inner -= share * along
            lengths -= along.square_()
        return self

    def back(self, level: float, noise: float = 0.0) -> Selection:
        """Drop columns one by one while the least one is not significant.

        Args:
            level: the chance of a false column in a row: of the best of n, which is what a false one is.
            noise: standard deviation of a value, where it is known and the same for all; otherwise the residual has it.
        """
        active = torch.arange(len(self.rest), device=self.rest.device)
        for _ in range(self.bound + 1):
            worth, rest = self.worth(active)
            self.rest[active] = rest.sum(0)
            taken = self.taken[active]
            if noise:
                from scipy import special  # loaded where it is needed, as all of SciPy

                gain = worth.sum(0)
                limit = noise**2 * float(special.chdtri(self.samples, level / self.n)) + self.floor[active]
            else:
                gain = torch.log1p(worth / (rest + self.floors[:, active]).unsqueeze(-1)).sum(0)
                limit = _ratio_limit(level / self.n, self.samples, self.k - taken.sum(-1))
            least, place = gain.masked_fill(~taken, torch.inf).min(-1)
            drop = least < limit
            if not bool(drop.any()):
                break
            active, place = active[drop], place[drop]
            self.taken[active, place] = False
        return self

    def worth(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much squared residuals grow without a column, `(S, R, bound)`, 0 for none; and they, `(S, R)`."""
        values = self.values[:, rows]
        q, r = self._factors(rows)
        image = q.mT @ values.unsqueeze(-1)
        rest = (values - (q @ image).squeeze(-1)).square().sum(-1)
        inverse = torch.linalg.solve_triangular(r, torch.eye(self.bound).to(r).expand_as(r), upper=True)
        worth = (inverse @ image).squeeze(-1).square() / inverse.square().sum(-1)
        return worth * self.taken[rows], rest

    def solve(self) -> Tensor:
        """Return the unknowns `(S, R, n)`, zero outside the support."""
        q, r = self._factors(torch.arange(len(self.rest), device=self.rest.device))
        found = torch.linalg.solve_triangular(r, q.mT @ self.values.unsqueeze(-1), upper=True).squeeze(-1) * self.taken
        whole = found.new_zeros(self.samples, len(self.rest), self.n)
        return whole.scatter_add_(2, self.columns.expand(self.samples, -1, -1), found)

    def mask(self) -> Tensor:
        """Return the supports as `(R, n)` bool."""
        found = torch.zeros(len(self.rest), self.n, dtype=torch.uint8, device=self.rest.device)
        return found.scatter_reduce_(1, self.columns, self.taken.to(torch.uint8), "amax").bool()

    def _factors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Q `(S, R, k, bound)` and R of the columns taken; places not in use have a row below that is theirs alone."""
        columns, taken = self.columns[rows], self.taken[rows]
        systems = self.probes[:, :, columns].permute(0, 2, 1, 3) * taken.unsqueeze(-2)
        own = torch.diag_embed((~taken).to(systems)).expand(self.samples, -1, -1, -1)
        q, r = torch.linalg.qr(torch.cat([systems, own], -2))
        return q[..., : self.k, :], r


def _ratio_limit(level: float, samples: int, spare: Tensor) -> Tensor:
    """What the sum of S logarithms of `1 + worth / rest` exceeds with probability `level`: Chernoff's bound.

    One of them, with d spare values and whatever variance, is minus the logarithm of a Beta(d / 2, 1 / 2).
    """
    counts, where = spare.unique(return_inverse=True)
    half = counts.double().unsqueeze(-1) / 2
    if samples == 1:
        from scipy import special  # loaded where it is needed, as all of SciPy

        share = torch.as_tensor(special.betaincinv(half.cpu().numpy(), 0.5, level), device=half.device)
        return -share.clamp_min(_TINY).log().squeeze(-1)[where]
    tilt = half * torch.linspace(0.001, 0.999, 999, dtype=torch.float64, device=half.device)
    growth = torch.lgamma(half - tilt) - torch.lgamma(half) + torch.lgamma(half + 0.5) - torch.lgamma(half + 0.5 - tilt)
    return ((samples * growth - math.log(level)) / tilt).amin(-1)[where]
