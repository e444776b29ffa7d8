"""What holds a hidden code: numbers, shares of a stage's mean squared gain, and the default below layers and blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Attention, assignments, blobs, mlp, relative
from references import literal_sweep
from torch import Tensor, nn

import beyondprop.nn as bnn
from beyondprop import AltMin, CodeProblem, Codes, RelativeDamping
from beyondprop.credit import code_solvers
from beyondprop.credit.damping import BLOCK_DAMPING, LAYER_DAMPING
from beyondprop.lab import registry
from beyondprop.stages.block import BlockPullback
from beyondprop.stages.chain import Chain

LOSS = nn.CrossEntropyLoss()
SOLVERS = ["line_search", "cg", "exact"]


class _Autograd(nn.Module):
    """A block of the same values as a `Residual`, of which no closed form is known."""

    def __init__(self, block: bnn.Residual) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def _net(form: str = "closed") -> nn.Sequential:
    """A layer, two residual blocks whose samples differ in gain, and a read-out."""
    torch.manual_seed(0)
    blocks = [bnn.Residual(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))) for _ in range(2)]
    inner: list[nn.Module] = [_Autograd(b) for b in blocks] if form == "autograd" else list(blocks)
    return nn.Sequential(nn.Linear(6, 5), *inner, nn.Linear(5, 3)).double()


@pytest.mark.parametrize("form", ["closed", "autograd"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("share", [0.1, 4.0])
def test_the_sweep_with_a_relative_damping_is_the_literal_one(share: float, normalize: bool, form: str) -> None:
    x, y = blobs(9, dtype=torch.float64)
    model = _net(form)
    found = assignments(model, LOSS, Codes(damping=RelativeDamping(share), normalize=normalize), x, y)
    expected = literal_sweep(list(model), x, y, lambda g, image: share * float(image.sum() / g.sum()), 1.0, normalize)
    for a, b in zip(found, expected, strict=True):
        assert relative(a.delta, b) < 1e-12


@pytest.mark.parametrize("form", ["closed", "autograd"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_is_as_published_below_a_layer_and_relative_below_a_block(solver: str, form: str) -> None:
    seen: dict[str, list[float]] = {}
    known: Any = code_solvers.BY_NAME[solver]()

    def spying(name: str) -> Any:
        def solve(problem: CodeProblem) -> Tensor:
            seen.setdefault(name, []).append(float(problem.damping))
            return known(problem)

        return solve

    x, y = blobs(9, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), *_net(form)).double()
    for name, damping in {"default": None, "relative": RelativeDamping(4.0), "unit": 1.0}.items():
        assignments(model, LOSS, Codes(spying(name), damping=damping), x, y)
    top, first, second, layer = seen["default"]
    assert (top, layer) == (1.0, 1.0)
    assert [top, first, second] == seen["relative"][:3]
    assert seen["relative"][3] != 1.0
    assert seen["unit"] == [1.0] * 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_relative_damping_solves_the_problem_of_the_number_that_it_comes_to(solver: str) -> None:
    """One hidden code below a block, whose problem says the number."""
    x, y = blobs(9, dtype=torch.float64)
    modules = list(_net())
    model = nn.Sequential(modules[0], *modules[2:])
    found: list[float] = []

    def spy(problem: CodeProblem) -> Tensor:
        found.append(float(problem.damping))
        return known(problem)

    known: Any = code_solvers.BY_NAME[solver]()
    assignments(model, LOSS, Codes(spy), x, y)
    by_name = assignments(model, LOSS, Codes(solver), x, y)
    by_number = assignments(model, LOSS, Codes(solver, damping=found[1]), x, y)
    assert found[1] > 0
    assert all(relative(a.delta, b.delta) < 1e-12 for a, b in zip(by_name, by_number, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_both_forms_of_a_block_are_damped_alike(solver: str) -> None:
    x, y = blobs(9, dtype=torch.float64)
    closed, local = (assignments(_net(form), LOSS, Codes(solver), x, y) for form in ("closed", "autograd"))
    assert all(relative(a.delta, b.delta) < 1e-9 for a, b in zip(closed, local, strict=True))


@pytest.mark.parametrize(("damping", "is_invariant"), [(RelativeDamping(0.5), True), (1.0, False)])
def test_only_a_relative_damping_knows_no_scale_of_the_code(damping: Any, is_invariant: bool) -> None:
    """The code times 50, which the layer above takes back: the same function, so the same deltas times 50 or 1 / 50."""
    x, y = blobs(12, dtype=torch.float64)
    model: Any = mlp(6, 5, 5, 3, activation="relu").double()
    before = assignments(model, LOSS, Codes(damping=damping), x, y)[-1].delta
    with torch.no_grad():
        first, second = model[0], model[2]
        first.weight.mul_(50.0)
        first.bias.mul_(50.0)
        second.weight.div_(50.0)
    after = assignments(model, LOSS, Codes(damping=damping), x, y)[-1].delta
    assert (relative(50.0 * after, before) < 1e-12) == is_invariant


def test_no_factor_is_more_than_promised() -> None:
    squared = torch.ones(6, dtype=torch.float64)
    curvature = torch.tensor([0.0, 0.1, 1.0, 1.0, 3.9, 0.0], dtype=torch.float64)
    for share in (0.5, 4.0):
        damping = share * float(curvature.mean())
        ((factors,), _) = code_solvers.step_factors(squared[None], curvature[None], damping, normalize=False)
        at_mean = 1 / (damping + float(curvature.mean()))
        assert float(factors.max()) / at_mean == pytest.approx(1 + 1 / share)


def test_a_large_share_is_the_gradient() -> None:
    x, y = blobs(9, dtype=torch.float64)
    held = assignments(_net(), LOSS, Codes(damping=RelativeDamping(1e9), mu=1e9), x, y)
    free = assignments(_net(), LOSS, Codes("gradient"), x, y)
    assert all(relative(a.delta, b.delta) < 1e-6 for a, b in zip(held, free, strict=True))


@pytest.mark.parametrize("form", ["closed", "autograd"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_and_batches_without_a_delta_get_none(solver: str, form: str) -> None:
    x, y = blobs(8, dtype=torch.float64)
    loss = nn.CrossEntropyLoss(ignore_index=-100, reduction="sum")
    none, half = torch.full_like(y, -100), y.clone()
    half[4:] = -100
    assert not any(bool(a.delta.any()) for a in assignments(_net(form), loss, Codes(solver), x, none))
    joined = assignments(_net(form), loss, Codes(solver), x, half)
    alone = assignments(_net(form), loss, Codes(solver), x[:4], y[:4])
    for a, b in zip(joined, alone, strict=True):
        assert relative(a.delta[:4], b.delta) < 1e-9
        assert not bool(a.delta[4:].any())


def test_time_steps_inside_a_recurrent_layer_keep_the_published_damping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(bnn.Recurrent(bnn.ElmanCell(3, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, 3, dtype=torch.float64), torch.randint(3, (6,))
    delta = torch.randn(6, 4, dtype=torch.float64)

    def swept(damping: Any) -> Tensor:
        pullback: Any = assignments(model, LOSS, Codes(damping=damping), x, y)[-1].pullback
        return torch.stack(pullback.sweep(delta), 1)

    assert torch.equal(swept(RelativeDamping(4.0)), swept(1.0))
    assert not torch.allclose(swept(7.0), swept(1.0))


def _stages(*modules: nn.Module) -> list[bool]:
    return [stage.is_block for stage in Chain(nn.Sequential(*modules)).stages]


class _Scaled(nn.Module):
    """A layer whose weight is made of two tensors of two dimensions each."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_block_is_a_stage_of_several_layers() -> None:
    block = bnn.Residual(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    hidden = _Autograd(copy.deepcopy(block))
    assert _stages(nn.Linear(4, 4), block, hidden, Attention(4, fused=False)) == [False, True, True, True]
    assert _stages(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Softsign(), nn.Linear(4, 4)) == [False, False]
    assert _stages(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)) == [False, False]
    assert _stages(bnn.Residual(nn.Sequential(nn.Linear(4, 4))), bnn.Recurrent(bnn.ElmanCell(4, 4))) == [False, False]
    assert _stages(nn.Linear(4, 4), _Scaled(), nn.utils.spectral_norm(nn.Linear(4, 4))) == [False] * 3
    assert _stages(nn.Conv2d(1, 2, 1), nn.LayerNorm([2, 4, 4]), nn.Conv2d(2, 2, 1)) == [False] * 2


def test_the_default_is_the_same_wherever_none_is_given() -> None:
    assert (1.0, RelativeDamping(4.0)) == (LAYER_DAMPING, BLOCK_DAMPING)
    model = mlp(6, 5, 3)
    assert AltMin(model, LOSS).credit.damping is None
    assert Codes().damping is None
    published = registry.rules.get("am-adam-unit").build(model, LOSS, 1e-3)
    assert isinstance(published, AltMin)
    assert published.credit.damping == 1.0


def test_blocks_of_large_gain_leave_no_sample_out() -> None:
    """Blocks that amplify a thousandfold: unit damping leaves the batch to its samples of least gain."""
    x, y = blobs(64, dtype=torch.float64)
    model: Any = _net()
    with torch.no_grad():
        for block in (model[1], model[2]):
            block.branch[2].weight.mul_(30.0)
    effective = {}
    for name, damping in {"default": None, "unit": 1.0}.items():
        found = assignments(model, LOSS, Codes(damping=damping), x, y)[-1].delta
        plain = assignments(model, LOSS, Codes("gradient"), x, y)[-1].delta
        weights = (found * plain).sum(1) / plain.square().sum(1)
        effective[name] = float(weights.sum() ** 2 / weights.square().sum())
    assert effective["default"] > 0.95 * len(x)
    assert effective["unit"] < 0.6 * len(x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("form", ["closed", "autograd"])
def test_half_precision_loses_no_stage(form: str, normalize: bool) -> None:
    """Sums of squares over a batch leave float16 at 65504."""
    x, y = blobs(128)
    model: Any = _net(form).float()
    with torch.no_grad():
        for module in (model[1], model[2]):
            block = module.block if form == "autograd" else module
            block.branch[2].weight.mul_(10.0)
    wide = assignments(model, LOSS, Codes(normalize=normalize), x, y)
    half = assignments(model.half(), LOSS, Codes(normalize=normalize), x.half(), y)
    assert all(relative(a.delta.float(), b.delta) < 0.05 for a, b in zip(half, wide, strict=True))


def test_many_blocks_in_float32_keep_what_float64_finds() -> None:
    """Without normalisation deltas shrink with every block, and their squares sooner."""
    x, y = blobs(16, dtype=torch.float64)
    torch.manual_seed(0)
    blocks = [bnn.Residual(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))) for _ in range(24)]
    model = nn.Sequential(nn.Linear(6, 5), *blocks, nn.Linear(5, 3)).double()
    with torch.no_grad():
        for block in blocks:
            block.branch[2].weight.mul_(3.0)  # type: ignore[operator]
    fine = assignments(model, LOSS, Codes(normalize=False), x, y)[-1].delta
    coarse = assignments(model.float(), LOSS, Codes(normalize=False), x.float(), y)[-1].delta
    assert float(fine.abs().max()) < 1e-12
    assert relative(coarse.double(), fine) < 1e-3


@pytest.mark.parametrize(("solver", "pushes"), [("line_search", 1), ("cg", 3), ("gradient", 0)])
def test_a_relative_damping_costs_no_push_more(solver: str, pushes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(9, dtype=torch.float64)
    count = 0
    push = BlockPullback.push

    def counting(self: BlockPullback, tangent: Tensor, *, gated: bool = False) -> Tensor:
        nonlocal count
        count += 1
        return push(self, tangent, gated=gated)

    monkeypatch.setattr(BlockPullback, "push", counting)
    assignments(_net("autograd"), LOSS, Codes(solver), x, y)
    assert count == 2 * pushes


def test_solvers_may_change_the_damping_and_read_it_after_the_search() -> None:
    x, y = blobs(9, dtype=torch.float64)
    read: list[tuple[float, float]] = []

    def wrapped(problem: CodeProblem) -> Tensor:
        if problem.loss is None:
            problem.damping = 100.0
        return code_solvers.line_search(problem)

    def reading(problem: CodeProblem) -> Tensor:
        before = float(problem.damping)
        delta = code_solvers.line_search(problem)
        read.append((before, float(problem.damping)))
        return delta

    found = assignments(_net(), LOSS, Codes(wrapped), x, y)
    expected = assignments(_net(), LOSS, Codes(damping=100.0), x, y)
    assert all(relative(a.delta, b.delta) < 1e-12 for a, b in zip(found, expected, strict=True))
    assignments(_net(), LOSS, Codes(reading), x, y)
    assert len(read) == 3
    assert all(before == after for before, after in read)


def test_solvers_that_never_push_have_the_published_damping_below_blocks() -> None:
    x, y = blobs(9, dtype=torch.float64)
    seen: list[float] = []

    def solve(problem: CodeProblem) -> Tensor:
        seen.append(float(problem.damping))
        return problem.gradient

    solve.pushes = False  # type: ignore[attr-defined]
    assignments(_net("autograd"), LOSS, Codes(solve), x, y)
    assert seen == [1.0] * 3
    for solver in ("gradient", code_solvers.momentum(2, 0.1), solve):
        with pytest.raises(ValueError, match="A RelativeDamping needs a solver that pushes tangents"):
            Codes(solver, damping=RelativeDamping(4.0))


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf"), "4"])
def test_a_share_that_is_no_positive_number_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match="share must be a finite number > 0"):
        RelativeDamping(share)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), "relative"])
def test_a_damping_that_is_neither_number_nor_share_is_refused(damping: Any) -> None:
    with pytest.raises(ValueError, match=r"damping must be a finite number >= 0.*RelativeDamping and None"):
        AltMin(mlp(6, 5, 3), LOSS, damping=damping)
