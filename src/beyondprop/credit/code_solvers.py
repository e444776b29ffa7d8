"""Ways to solve one code's problem; each maps a `CodeProblem` to a delta, sample by sample.

A solver with the attribute `pushes = False` never pushes tangents through a stage, which lets stages without closed
forms keep no second-order graph; with `needs_codes = False` it never looks at a stage's input or output, whose memory
is then free; with `is_homogeneous = True` its delta grows in proportion to the one above. Where `problem.normalize` asks
for it, a solver keeps the mean length of the gradient (`problem.keep_norm`), so that deltas have the same size at any depth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from beyondprop import _checks
from beyondprop.credit.code_problem import CodeProblem, CodeSolver, flat, per_sample, square_norm, summed, tiny


def gradient(problem: CodeProblem) -> Tensor:
    """Return `J^T delta`: the exact backpropagation limit (damping to infinity, rescaled)."""
    return problem.gradient


gradient.pushes = False  # type: ignore[attr-defined]
gradient.needs_codes = False  # type: ignore[attr-defined]
gradient.is_homogeneous = True  # type: ignore[attr-defined]


def line_search(problem: CodeProblem) -> Tensor:
    """Return the exact minimiser along the gradient, per sample: `g |g|^2 / (damping |g|^2 + (J g)^T H (J g))`."""
    g = problem.gradient
    squared, curvature = square_norm(g), problem.curvature(problem.pushed())
    normal = {"normalize": problem.normalize, "group": problem.group}
    factors, _ = step_factors(squared[None], curvature[None], problem.damping, **normal)
    return g.mul_(per_sample(factors[0], g))


def step_factors(
    squared: Tensor,
    curvature: Tensor,
    damping: float | Tensor,
    *,
    normalize: bool,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | float]:
    """Return the exact line search's factors `|g|^2 / (damping |g|^2 + curvature)`, `(codes, N)`, and 1 over their means.

    Args:
        squared: `|g|^2`, `(codes, N)`.
        curvature: `(J g)^T H (J g)`, `(codes, N)`.
        damping: a number, or a tensor that broadcasts to `(codes, N)`.
        normalize: divide every code's factors by their mean over the samples that have a gradient.
        group: process group whose ranks have parts of the batch.
    """
    least = tiny(squared)
    if isinstance(damping, Tensor):
        system = torch.addcmul(curvature, squared, damping)
    else:
        system = torch.add(curvature, squared, alpha=damping)
    factors = squared / system.add_(least)  # 0 for a sample without gradient
    if not normalize:
        return factors, 1.0
    live, total = squared.count_nonzero(1), factors.sum(1)
    if group is not None:
        live, total = summed(torch.stack([live.to(total), total]), group).unbind()
    inverse = (live / total.clamp_min_(least))[:, None]
    return factors.mul_(inverse), inverse


line_search.needs_codes = False  # type: ignore[attr-defined]
line_search.is_homogeneous = True  # type: ignore[attr-defined]


def cg(iterations: int) -> CodeSolver:
    """Return a solver of `(damping I + J^T H J) d = g` by conjugate gradients, from d = 0.

    Args:
        iterations: >= 1; one push and one pullback each. One iteration equals `line_search`.
    """
    _checks.at_least("iterations", iterations, 1)

    def solve(problem: CodeProblem) -> Tensor:
        # Samples are independent systems, unless batch statistics couple them: then the batch is one system.
        couples = problem.stage.stage.couples_batch
        d = torch.zeros_like(problem.gradient)
        wide = torch.promote_types(d.dtype, torch.float32)  # a sum in float16 ends at 65504

        def dot(a: Tensor, b: Tensor) -> Tensor:
            products = a.to(wide) * b
            return products.sum() if couples else flat(products).sum(1)

        residual = problem.gradient
        direction = residual
        squared = dot(residual, residual)
        floor = tiny(squared)
        damping = torch.as_tensor(problem.damping, dtype=wide, device=d.device)
        for i in range(iterations):
            image = problem.stage.push(direction) if i else problem.pushed()
            curved = problem.stage(problem.curve(image))
            product = torch.addcmul(curved, direction, damping)
            bend = dot(direction, product)
            # Where the loss bends downwards, damping alone bounds the step.
            bend = torch.where(bend > 0, bend, damping * dot(direction, direction))
            step = (squared / bend.clamp_min(floor)).to(d.dtype)
            d = torch.addcmul(d, per_sample(step, d), direction)
            if i + 1 == iterations:
                break
            residual = torch.addcmul(residual, per_sample(step, d), product, value=-1.0)
            before, squared = squared, dot(residual, residual)
            kept = (squared / before.clamp_min(floor)).to(d.dtype)
            direction = torch.addcmul(residual, per_sample(kept, d), direction)
        return problem.keep_norm(d)

    solve.needs_codes = False  # type: ignore[attr-defined]
    solve.is_homogeneous = True  # type: ignore[attr-defined]
    return solve


def exact(limit: int = 4096) -> CodeSolver:
    """Return a solver of `(damping I + J^T H J) d = g` by Cholesky or LU, the smaller of two systems.

    Forms the Jacobian of every sample: for narrow stages.

    Args:
        limit: largest code width (units a sample) and stage output for which a Jacobian is formed.
    """
    _checks.at_least("limit", limit, 1)

    def solve(problem: CodeProblem) -> Tensor:
        stage, name = problem.stage, problem.stage.stage.name
        if stage.stage.couples_batch:
            raise ValueError(
                f"Stage {name!r} normalises over the batch, so a sample has no Jacobian of its own: use solver='cg', "
                "'line_search' or model.eval()."
            )
        width, out = stage.input[0].numel(), stage.output[0].numel()
        if max(width, out) > limit:
            raise ValueError(
                f"Stage {name!r} maps {width} to {out} units, over the limit of {limit} for solver='exact': use 'cg' or raise "
                "code_solvers.exact(limit=...)."
            )
        wide = torch.promote_types(problem.gradient.dtype, torch.float32)  # nothing factorises half precision
        narrow = _jacobian(problem, width, out).to(problem.gradient.dtype)  # (N, out, width)
        jacobian = curved = narrow.to(wide)
        if problem.loss is not None:
            columns = [flat(problem.curve(narrow[..., i].view_as(stage.output))) for i in range(width)]
            curved = torch.stack(columns, -1).to(wide)  # H J
        with torch.autocast(jacobian.device.type, enabled=False):
            right, transposed = flat(problem.gradient)[..., None].to(wide), jacobian.transpose(1, 2)
            if problem.damping == 0.0:  # minimum norm: the pseudo-inverse, target propagation
                d = torch.linalg.pinv(transposed @ curved, hermitian=True) @ right
            elif width <= out or stage.has_codes:
                system = transposed @ curved
                system.diagonal(dim1=1, dim2=2).add_(problem.damping)
                d = torch.cholesky_solve(right, torch.linalg.cholesky(system))
            else:
                # (r I + J^T H J)^-1 J^T = J^T (r I + H J J^T)^-1
                system = curved @ transposed
                system.diagonal(dim1=1, dim2=2).add_(problem.damping)
                d = transposed @ torch.linalg.solve(system, flat(problem.delta).to(jacobian.dtype)[..., None])
        return problem.keep_norm(d.to(problem.gradient.dtype).view_as(problem.gradient))

    solve.is_homogeneous = True  # type: ignore[attr-defined]
    return solve


def momentum(
    steps: int, lr: float, *, momentum: float = 0.9, features_mean: bool = True, mu_below: bool = False
) -> CodeSolver:
    """Return the published code optimizer: `steps` of gradient descent with Nesterov momentum on the code's objective.

    The authors' release minimises, for the top code, `Loss / mu + MSE(c, c0)` and, for the others, `MSE(above) + MSE(c, c0)`,
    every mean over batch and features. So does this, in delta form; its steps are large, so that each goes through the
    stage and the loss as they are at the moved code, not through their model at the forward pass.

    Args:
        steps: >= 1.
        lr: > 0, step size of the codes.
        momentum: in [0, 1); as in `torch.optim.SGD(nesterov=True)`.
        features_mean: divide by batch and features as published; False sums over features, per sample.
        mu_below: divide the upper term of the other codes by mu, too, as the authors' LeNet code does.
    """
    _checks.at_least("steps", steps, 1)
    _checks.positive("lr", lr)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}.")

    def solve(problem: CodeProblem) -> Tensor:
        stage, d = problem.stage, torch.zeros_like(problem.gradient)
        own = above = 1.0
        if features_mean:
            share = problem.share
            own = 2.0 * share / d.numel()
            above = 2.0 * share / problem.delta.numel() if problem.loss is None else share / len(d)
        if problem.loss is not None:
            above /= problem.damping  # Loss / mu
        elif mu_below:
            above /= problem.mu
        velocity = torch.zeros_like(d)
        for i in range(steps):
            pull = problem.gradient
            if i:
                moved = stage.at(stage.input + d)
                change = moved.output - stage.output
                loss = problem.loss
                pull = moved(problem.delta - change if loss is None else -loss.again(stage.output + change).cotangent)
            downhill = above * pull - own * d
            velocity = momentum * velocity + downhill
            d = d + lr * (downhill + momentum * velocity)
        return problem.keep_norm(d)

    solve.pushes = False  # type: ignore[attr-defined]
    return solve


BY_NAME: dict[str, Callable[[], CodeSolver]] = {
    "line_search": lambda: line_search,
    "gradient": lambda: gradient,
    "cg": lambda: cg(3),
    "exact": exact,
}


def _jacobian(problem: CodeProblem, width: int, out: int) -> Tensor:
    stage, rows = problem.stage, len(problem.stage.input)
    like = stage.input if width <= out else stage.output
    basis = torch.eye(min(width, out), dtype=like.dtype, device=like.device)
    units = (e.expand(rows, -1).reshape(like.shape) for e in basis)
    if width <= out:
        return torch.stack([flat(stage.push(e)) for e in units], -1)
    return torch.stack([flat(stage(e)) for e in units], 1)
