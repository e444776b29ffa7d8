"""Theorem 3.2 of online alternating minimization as code: its step sizes, its bound, and problems to hold them against.

Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", ICML 2019, arXiv 1806.09077.
K blocks of parameters take stochastic gradient steps in turn, each at the newest values of the others, each projected on a
ball around its start:

| paper | here |
|---|---|
| K | `blocks` |
| lambda_d, mu_d: block d's objective is lambda_d-strongly convex and mu_d-smooth | `lam`, `mu`: the least, the largest |
| gamma_d: how much block d's gradient changes with the distance of the others from their optimum | `gamma`: the largest |
| xi = min_d 2 mu_d lambda_d / (mu_d + lambda_d) | `xi` |
| gamma < 2 xi / (3 (K - 1)) | `limit` |
| eta_t = (3/2) / ([2 xi - 3 gamma (K - 1)] (t + 2) + (3/2) (K - 1) gamma) | `step_size` |
| E_{t+1} <= E_0 (2 / (t+3))^{3/2} + sigma^2 9 / ([2 xi - 3 gamma (K - 1)]^2 (t+3)) | `bound` |

E_t is the expected squared distance of all blocks from the optimum, sigma^2 the sum over the blocks of the largest expected
squared norm of a block's stochastic gradient within the balls.

The theorem's xi is too large. Its proof needs `<block gradient, distance> >= xi |distance|^2`, which strong convexity gives
for lambda alone, and `2 mu lambda / (mu + lambda)` is between lambda and 2 lambda. Where blocks couple along their directions
of least curvature and mu > 3 lambda, admissible constants exist whose optimum is a saddle point, from which the error grows
(`coupling="aligned"` builds them). With `xi = lambda` (`curvature="strong"`) every step of the proof holds, and with it the
bound; for mu = lambda the two are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from beyondprop import _checks


@dataclass(frozen=True, slots=True)
class BlockConstants:
    """The constants of an objective in blocks, and what the theorem says of stochastic block descent on it.

    Args:
        lam: lambda > 0, strong convexity of the blocks.
        mu: >= lam, their smoothness.
        gamma: >= 0, gradient stability; below `limit` where the theorem speaks.
        blocks: K >= 1.
        curvature: `"published"`: xi = 2 mu lam / (mu + lam); `"strong"`: xi = lam, with which the proof holds.
        force: accept an inadmissible gamma, to look at what happens there; the bound means nothing then.

    Raises:
        ValueError: if a constant is out of its range, or gamma is inadmissible and `force` is false.

    Example:
        >>> constants = BlockConstants(lam=1.0, mu=1.0, gamma=0.2, blocks=3)
        >>> round(constants.limit, 4)
        0.3333
        >>> constants.step_size(torch.tensor([0, 100])).tolist()
        [0.6818181818181819, 0.018248175182481757]
    """

    lam: float
    mu: float
    gamma: float
    blocks: int
    curvature: str = "published"
    force: bool = False

    def __post_init__(self) -> None:
        _checks.positive("lam", self.lam)
        _checks.positive("mu", self.mu)
        _checks.non_negative("gamma", self.gamma)
        _checks.at_least("blocks", self.blocks, 1)
        _checks.one_of("curvature", self.curvature, ("published", "strong"))
        if self.mu < self.lam:
            raise ValueError(f"mu must be >= lam={self.lam:g}, got {self.mu:g}.")
        if not self.is_admissible and not self.force:
            raise ValueError(
                f"gamma must be < 2 xi / (3 (blocks - 1)) = {self.limit:.4g}, with xi = {self.xi:.4g} and {self.blocks} "
                f"blocks, got {self.gamma:.4g}: the theorem promises nothing there. force=True runs it all the same."
            )

    @property
    def xi(self) -> float:
        """The curvature that the step sizes count on."""
        return self.lam if self.curvature == "strong" else 2 * self.mu * self.lam / (self.mu + self.lam)

    @property
    def limit(self) -> float:
        """What gamma must be below: `2 xi / (3 (K - 1))`."""
        return math.inf if self.blocks == 1 else 2 * self.xi / (3 * (self.blocks - 1))

    @property
    def is_admissible(self) -> bool:
        """Whether the theorem speaks about these constants."""
        return self.gamma < self.limit

    @property
    def margin(self) -> float:
        """`2 xi - 3 gamma (K - 1)`, the curvature that the coupling leaves; negative where gamma is inadmissible."""
        return 2 * self.xi - 3 * self.gamma * (self.blocks - 1)

    def step_size(self, t: Tensor) -> Tensor:
        """Return eta_t of the steps `t`, counted from 0, in float64; beyond the limit it turns negative."""
        t = _steps(t)
        return 1.5 / (self.margin * (t + 2) + 1.5 * (self.blocks - 1) * self.gamma)

    def bound(self, t: Tensor, initial: float | Tensor, noise: float | Tensor) -> Tensor:
        """Return the bound on the expected squared error E_t after `t` steps, in float64.

        Args:
            t: steps done, any shape; the theorem's t + 1.
            initial: E_0 >= 0.
            noise: sigma^2 >= 0, see the module; it holds the gradient itself, not only what is random in it.
        """
        t = _steps(t)
        return initial * (2 / (t + 2)) ** 1.5 + noise * 9 / (self.margin**2 * (t + 2))


@dataclass(frozen=True, slots=True)
class BlockQuadratic:
    """Quadratic objectives `z^T H z / 2` of the distance z from the optimum, one for each repeat.

    Attributes:
        hessian: `(repeats, K dim, K dim)`, float64, symmetric.
        start: distance from the optimum at the start, `(repeats, K dim)`.
        blocks: K.
    """

    hessian: Tensor
    start: Tensor
    blocks: int

    @property
    def dim(self) -> int:
        """Parameters of a block."""
        return self.start.shape[1] // self.blocks


def quadratic(
    constants: BlockConstants,
    *,
    dim: int = 10,
    repeats: int = 60,
    distance: float = 1.0,
    coupling: str = "random",
    generator: torch.Generator,
) -> BlockQuadratic:
    """Draw objectives that have the given constants exactly.

    Every diagonal block has eigenvalues in [lam, mu], both ends among them; every other block has spectral norm gamma.

    Args:
        constants: lam, mu, gamma and K.
        dim: parameters of a block, >= 2.
        repeats: how many objectives.
        distance: of every block from its optimum at the start.
        coupling: `"random"`: drawn blocks; `"aligned"`: each couples the others' directions of least curvature, in which
            the start lies: the hardest objective with these constants.
        generator: where the objectives come from.

    Raises:
        ValueError: if an argument is out of its range; the message has the range.
    """
    _checks.at_least("dim", dim, 2)
    _checks.at_least("repeats", repeats, 1)
    _checks.positive("distance", distance)
    _checks.one_of("coupling", coupling, ("random", "aligned"))
    count, gamma = constants.blocks, constants.gamma

    def normal(*shape: int) -> Tensor:
        return torch.randn(repeats, *shape, dtype=torch.float64, generator=generator)

    inner = constants.lam + (constants.mu - constants.lam) * torch.rand(
        repeats, count, dim, dtype=torch.float64, generator=generator
    )
    inner[..., 0], inner[..., 1] = constants.lam, constants.mu
    basis = torch.linalg.qr(normal(count, dim, dim)).Q
    hessian = torch.zeros(repeats, count, dim, count, dim, dtype=torch.float64)
    for i in range(count):
        hessian[:, i, :, i] = basis[:, i] * inner[:, i, None] @ basis[:, i].mT
        for j in range(i):
            if coupling == "random":
                block = normal(dim, dim)
                block *= gamma / torch.linalg.matrix_norm(block, 2)[:, None, None]
            else:
                block = -gamma * basis[:, i, :, :1] @ basis[:, j, :, :1].mT
            hessian[:, i, :, j], hessian[:, j, :, i] = block, block.mT
    start = normal(count, dim) if coupling == "random" else basis[..., 0].clone()
    start *= distance / start.norm(dim=-1, keepdim=True)
    return BlockQuadratic(hessian.view(repeats, count * dim, count * dim), start.flatten(1), count)


def descend(
    problem: BlockQuadratic, sizes: Tensor, *, noise: float, radius: float, generator: torch.Generator
) -> Tensor:
    """Make projected stochastic block descent steps and return the squared error `(steps + 1, repeats)`, the start first.

    Args:
        problem: the objectives.
        sizes: step sizes `(steps,)`.
        noise: root of the mean squared norm of the Gaussian noise in a block's gradient.
        radius: of every block's ball around its start; the optimum must lie in it.
        generator: where the noise comes from.
    """
    dim, z = problem.dim, problem.start.clone()
    blocks = [slice(d * dim, (d + 1) * dim) for d in range(problem.blocks)]
    errors = [z.square().sum(1)]
    for size in sizes.tolist():
        for block in blocks:
            gradient = (problem.hessian[:, block] @ z[..., None]).squeeze(-1)
            if noise:
                drawn = torch.randn(gradient.shape, dtype=z.dtype, generator=generator)
                gradient.add_(drawn, alpha=noise / math.sqrt(dim))
            moved = z[:, block] - size * gradient - problem.start[:, block]
            moved *= (radius / moved.norm(dim=1, keepdim=True)).clamp_max(1.0)
            z[:, block] = problem.start[:, block] + moved
        errors.append(z.square().sum(1))
    return torch.stack(errors)


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """Measured error against the bound.

    Attributes:
        error: mean squared error after 0, 1, ... steps, `(steps + 1,)`.
        bound: the theorem's bound on it.
        slope: of log error over log steps in the last nine tenths of the steps.
        holds: whether the constants are admissible and the error was at or below the bound after every step; of other constants
            the theorem says nothing.
        slack: bound over error, where it is least.
    """

    error: Tensor
    bound: Tensor
    slope: float
    holds: bool
    slack: float


def measure(
    constants: BlockConstants,
    *,
    noise: float,
    steps: int = 4000,
    repeats: int = 60,
    dim: int = 10,
    distance: float = 1.0,
    radius: float = 2.0,
    coupling: str = "random",
    seed: int = 0,
) -> Measurement:
    """Run block descent with the theorem's step sizes on objectives with the theorem's constants.

    Args:
        constants: what step sizes and bound are computed from.
        noise: root of the mean squared norm of the noise in a block's gradient, >= 0.
        steps: rounds over all blocks.
        repeats: independent objectives and noise that the error is the mean of.
        dim: see `quadratic`.
        distance: see `quadratic`.
        radius: of the balls that blocks are projected on, >= distance.
        coupling: see `quadratic`.
        seed: of objectives and noise.

    Raises:
        ValueError: if an argument is out of its range; the message has the range.
    """
    _checks.non_negative("noise", noise)
    _checks.at_least("steps", steps, 10)
    if not distance <= radius < math.inf:
        raise ValueError(
            f"radius must be >= distance={distance:g}, so that the optimum is in the ball, and finite, got {radius!r}."
        )
    generator = torch.Generator().manual_seed(seed)
    problem = quadratic(constants, dim=dim, repeats=repeats, distance=distance, coupling=coupling, generator=generator)
    t = torch.arange(steps + 1)
    error = descend(problem, constants.step_size(t[:-1]), noise=noise, radius=radius, generator=generator).mean(1)
    # No block is farther than `farthest` from its optimum: the largest gradient, and the noise.
    farthest = radius + distance
    largest = (constants.mu + constants.gamma * (constants.blocks - 1)) * farthest
    second_moment = constants.blocks * (largest**2 + noise**2)
    bound = constants.bound(t, float(error[0]), second_moment)
    slack = bound / error
    holds = constants.is_admissible and bool((error <= bound).all())
    return Measurement(error, bound, slope(error), holds, float(slack.min()))


def slope(error: Tensor) -> float:
    """Return the least-squares slope of log error over log t in the last nine tenths of the steps.

    Args:
        error: `(steps + 1,)`, the start first. Points are weighted alike on the logarithmic axis.
    """
    steps = len(error) - 1
    first = max(1, steps // 10)
    t = torch.logspace(math.log10(first), math.log10(steps), 50, dtype=torch.float64).round().long().unique()
    x, y = t.double().log(), error[t].double().clamp_min(1e-300).log()
    x = x - x.mean()
    return float((x @ (y - y.mean())) / (x @ x))


def _steps(t: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a torch.Tensor of step numbers, got {type(t).__name__}.")
    if bool((t < 0).any()):
        raise ValueError(f"t counts steps from 0, got {t.min().item()}.")
    return t.double()
