"""Alternating minimization with memory against batch least squares."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Residual, assignments, blobs, convnet, difference, equal, images, mlp, relative, state
from torch import Tensor, nn

from beyondprop import AltMin, Codes, Memory, NonFiniteError, UnsupportedModelError
from beyondprop.lab import nets


def _batches(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    x, y = blobs(count * rows, dtype=torch.float64)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def _rule(model: nn.Module, memory: Memory) -> AltMin:
    return AltMin(model.double(), nn.CrossEntropyLoss(), memory, code_solver="line_search", normalize=False)


def _deltas(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every stage's inputs with a constant, and its delta, lowest first."""
    found = assignments(model, nn.CrossEntropyLoss(), Codes(normalize=False), x, y)
    result = []
    for a in reversed(found):
        features = F.pad(a.pullback.features, (0, 1), value=1.0)  # type: ignore[attr-defined]
        result.append((features, a.delta))
    return result


def _whole(layer: Any) -> Tensor:
    """Weights `(out, n)` with the bias as the last column."""
    weight = layer.weight.detach().flatten(1)
    return weight.clone() if layer.bias is None else torch.cat([weight, layer.bias.detach()[:, None]], 1)


@pytest.mark.parametrize("forgetting", [0.0, 0.3])
@pytest.mark.parametrize("refresh", [1, 2])
def test_rls_steps_are_gradients_times_the_damped_inverse_of_all_moments(forgetting: float, refresh: int) -> None:
    model = mlp(6, 5, 4, 3)
    rule = _rule(model, Memory(lr=0.7, max_gain=None, damping=0.2, forgetting=forgetting, refresh=refresh))
    layers = [model[0], model[2], model[4]]
    moments: list[Any] = [None] * 3
    inverses: list[Any] = [None] * 3
    for step, (x, y) in enumerate(_batches(5)):
        before = [_whole(layer) for layer in layers]
        deltas = _deltas(model, x, y)
        rule.step(x, y)
        for i, (a, delta) in enumerate(deltas):
            own, share = a.t() @ a / len(a), max(forgetting, 1 / (step + 1))
            moments[i] = own if moments[i] is None else (1 - share) * moments[i] + share * own
            if step % refresh == 0:
                inverses[i] = torch.linalg.inv(moments[i] + 0.2 * torch.eye(len(moments[i]), dtype=a.dtype))
            expected = before[i] + 0.7 * (delta.t() @ a / len(a)) @ inverses[i]
            assert relative(_whole(layers[i]), expected) < 1e-10


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("max_gain", [1e-3, 0.5, 1e9])
def test_the_step_is_as_large_as_the_mean_gain_allows(net: str, reduction: str, max_gain: float) -> None:
    """`min(1, max_gain / gain)`, gain the mean over samples of the sum over their rows of `a^T P a` times a sample's weight."""
    model = mlp(6, 5, 3) if net == "mlp" else nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 3))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    free, rule = (
        AltMin(m.double(), loss, Memory(lr=0.01, max_gain=bound), normalize=False)
        for m, bound in ((copy.deepcopy(model), None), (model, max_gain))
    )
    x, y = blobs(8, dtype=torch.float64) if net == "mlp" else images(8, torch.float64)
    layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    before = [_whole(layer) for layer in layers]
    found = list(reversed(assignments(model, loss, Codes(normalize=False), x, y)))
    # In two parts, whose samples are one batch.
    for part in (slice(0, 3), slice(3, 8)):
        for one in (free, rule):
            one.backward(x[part], y[part], scale=(3 if part.stop == 3 else 5) / 8 if reduction == "mean" else 1.0)
    for one in (free, rule):
        one.update()
    of_free = [_whole(m) for m in free.model.children() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer, start, plain, a in zip(layers, before, of_free, found, strict=True):
        rows = a.pullback.feature_rows()  # type: ignore[attr-defined]
        weight = 1 / 8 if reduction == "mean" else 1.0
        inverse = torch.linalg.inv(weight * rows.t() @ rows + 0.5 * torch.eye(rows.shape[1], dtype=x.dtype))
        gain = float(torch.einsum("ni,ij,nj->", rows, inverse, rows)) * weight / 8
        assert relative(_whole(layer) - start, min(1, max_gain / gain) * (plain - start)) < 1e-9


def test_without_need_the_bound_leaves_every_bit() -> None:
    torch.manual_seed(0)
    models = [mlp(6, 5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = blobs(400)
    for model, bound in zip(models, (None, 0.5), strict=True):
        rule = AltMin(model, nn.CrossEntropyLoss(), Memory(max_gain=bound, refresh=2))
        for _ in range(5):
            rule.step(x, y)
    assert equal(state(models[0]), state(models[1]))


@pytest.mark.parametrize(
    ("loss", "curvature"),
    [
        (nn.MSELoss(), 2 / 3),
        (nn.MSELoss(reduction="sum"), 2.0),
        (lambda o, y: (o - y).square().sum(1).mean(), 2.0),
        (lambda o, y: 0.05 * (o - y).square().sum(1).mean(), 0.1),
    ],
)
def test_a_curved_loss_takes_smaller_steps(loss: Any, curvature: float) -> None:
    model = mlp(6, 5, 3).double()
    twin = copy.deepcopy(model)
    before = _whole(model[0])
    x = torch.randn(8, 6, dtype=torch.float64)
    y = torch.randn(8, 3, dtype=torch.float64)
    for m, bound in ((model, 1e9), (twin, None)):
        AltMin(m, loss, Memory(lr=0.01, max_gain=bound)).step(x, y)
    assert relative(_whole(model[0]) - before, min(1, 0.25 / curvature) * (_whole(twin[0]) - before)) < 1e-9


@pytest.mark.parametrize("task", ["labels", "numbers"])
@pytest.mark.parametrize("batch", [1, 10, 50, 200, 1000])
def test_defaults_train_at_any_batch_size(task: str, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 100) @ torch.diag(torch.linspace(0.01, 3, 100))
    wanted = x @ torch.randn(100, 4) / 10
    y = wanted.argmax(1) if task == "labels" else wanted[:, :1]
    loss = nn.CrossEntropyLoss() if task == "labels" else nn.MSELoss()
    model = nn.Sequential(
        nn.Linear(100, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4 if task == "labels" else 1)
    )
    rule = AltMin(model, loss, Memory())
    before = float(loss(model(x), y).detach())
    for rows in torch.randint(3000, ({1: 300, 10: 100}.get(batch, 40), batch)):
        rule.step(x[rows], y[rows])
    assert float(loss(model(x), y).detach()) < (0.95 if batch == 1 else 0.8) * before


def test_a_gain_that_overflows_is_refused_and_nothing_changes() -> None:
    model = mlp(6, 5, 3)
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory(damping=1e-9))
    x, y = torch.randn(1, 6), torch.zeros(1).long()
    rule.step(x, y)
    before = state(model)
    with pytest.raises(NonFiniteError, match="second moments of its inputs are too large"):
        rule.step(1e18 * x.flip(1), y)
    assert equal(before, state(model))


def test_rls_in_one_batch_is_the_ridge_solution() -> None:
    model = mlp(6, 5, 3)
    rule = _rule(model, Memory(lr=1.0, max_gain=None, damping=0.3))
    ((x, y),) = _batches(1)
    before = _whole(model[0])
    (a, delta), _ = _deltas(model, x, y)
    rule.step(x, y)
    change = _whole(model[0]) - before
    # argmin |delta - a dW^T|^2 / N + damping |dW|^2, stacked as one least-squares problem
    rows = torch.cat([a / len(a) ** 0.5, 0.3**0.5 * torch.eye(7, dtype=a.dtype)])
    wanted = torch.cat([delta / len(a) ** 0.5, torch.zeros(7, 5, dtype=a.dtype)])
    assert relative(change.t(), torch.linalg.lstsq(rows, wanted).solution) < 1e-10


def test_conv_memory_is_that_of_its_patches() -> None:
    conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0))
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), conv, nn.Flatten(), nn.Linear(84, 3))
    rule = _rule(model, Memory(lr=1.0, max_gain=None, damping=0.5))
    x, y = images(6, torch.float64)
    before = _whole(conv)
    a = assignments(model, nn.CrossEntropyLoss(), Codes(normalize=False), x, y)[1]
    rows = F.unfold(a.pullback.features, (3, 2), padding=(1, 0), stride=(2, 1))  # type: ignore[attr-defined]
    rows = F.pad(rows.transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)
    delta = a.delta.flatten(2).transpose(1, 2).flatten(0, 1)
    rule.step(x, y)
    expected = (delta.t() @ rows / 6) @ torch.linalg.inv(rows.t() @ rows / 6 + 0.5 * torch.eye(13, dtype=x.dtype))
    assert relative(_whole(conv) - before, expected) < 1e-10


@pytest.mark.parametrize("method", ["rls", "bcd"])
def test_behind_pooling_and_dropout_the_memory_is_that_of_what_the_weights_see(method: str) -> None:
    torch.manual_seed(0)
    first, second, last = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 2), nn.Linear(12, 3)
    hidden = [nn.ReLU(), nn.MaxPool2d(2), second, nn.Tanh(), nn.Dropout(0.4), nn.Flatten()]
    model = nn.Sequential(first, *hidden, last)
    memory = Memory(method, lr=0.7, max_gain=None, damping=0.2, block=50)
    rule = AltMin(model.double(), nn.CrossEntropyLoss(), memory, code_solver="gradient")
    x, y = images(6, torch.float64)

    torch.manual_seed(3)
    low = first(x)
    pooled = F.max_pool2d(low.relu(), 2)
    middle = second(pooled)
    dropped = F.dropout(middle.tanh(), 0.4).flatten(1)
    output = last(dropped)
    deltas = [-6 * g for g in torch.autograd.grad(F.cross_entropy(output, y), [low, middle, output])]
    rows = [F.unfold(x, 3).mT.flatten(0, 1), F.unfold(pooled, 2).mT.flatten(0, 1), dropped]
    layers = [first, second, last]
    before = [_whole(layer) for layer in layers]

    torch.manual_seed(3)
    rule.step(x, y)
    served = range(3) if method == "rls" else range(2)  # the published form trains the last stage by gradients
    assert set(rule.solver.state_dict()) == {str(i) for i in served}
    for i in served:
        a = F.pad(rows[i].detach(), (0, 1), value=1.0)
        delta = deltas[i].flatten(2).mT.flatten(0, 1) if deltas[i].ndim == 4 else deltas[i]
        inverse = torch.linalg.inv(a.t() @ a / 6 + 0.2 * torch.eye(a.shape[1], dtype=a.dtype))
        size = 0.7 if method == "rls" else 1.0
        assert relative(_whole(layers[i]) - before[i], size * (delta.t() @ a / 6) @ inverse) < 1e-9


@pytest.mark.parametrize(("net", "stages"), [("lenet5", 5), ("mlp:20x2:dropout=0.2", 3), ("conv:4x3:bn", 1)])
def test_every_linear_or_conv_without_a_norm_has_a_memory(net: str, stages: int) -> None:
    rule = AltMin(nets.build(net, (1, 16, 16), 5), nn.CrossEntropyLoss(), Memory())
    assert len(rule.solver.state_dict()) == stages


def test_a_model_that_changes_its_dtype_is_refused_with_both() -> None:
    model = mlp(6, 5, 3)
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory())
    model.double()
    before = state(model)
    with pytest.raises(ValueError, match=r"Stage '2' has inputs of dtype torch.float64, its memory has torch.float32"):
        rule.step(*blobs(8, dtype=torch.float64))
    assert equal(before, state(model))


def _accumulated(model: nn.Module, rule: AltMin, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run batches; for each: A and B summed over all so far, and the weights that the step began with."""
    total_a = total_b = torch.zeros(())
    result = []
    for x, y in _batches(count):
        weights = _whole(model[0])  # type: ignore[index]
        a, delta = _deltas(model, x, y)[0]
        code = a @ weights.t() + delta
        total_a, total_b = total_a + a.t() @ a, total_b + code.t() @ a
        rule.step(x, y)
        result.append((total_a.clone(), total_b.clone(), weights))
    return result


def test_bcd_by_columns_is_the_published_rule() -> None:
    """`w_j <- w_j + (b_j - W A_j) / A_jj`, one column after the other, on A and B as summed."""
    model = mlp(6, 5, 3)
    rule = _rule(model, Memory("bcd", damping=1e-12, block=1))
    steps = _accumulated(model, rule, 1)
    for _ in range(3):
        a, b, weights = steps[-1]
        for j in range(7):
            weights[:, j] += (b[:, j] - weights @ a[:, j]) / a[j, j]
        assert relative(_whole(model[0]), weights) < 1e-8
        steps = [_next(model, rule, steps[-1])]


def _next(model: nn.Sequential, rule: AltMin, last: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(int(1000 * float(last[0].trace())))
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    weights = _whole(model[0])
    a, delta = _deltas(model, x, y)[0]
    code = a @ weights.t() + delta
    rule.step(x, y)
    return last[0] + a.t() @ a, last[1] + code.t() @ a, weights


@pytest.mark.parametrize(("block", "sweeps"), [(1, 400), (3, 200), (7, 60), (50, 60)])
def test_bcd_converges_to_the_ridge_solution(block: int, sweeps: int) -> None:
    model = mlp(6, 5, 3)
    rule = _rule(model, Memory("bcd", damping=0.5, block=block, sweeps=sweeps))
    (x, y), *_ = _batches(1, rows=40)
    before = _whole(model[0])
    a, delta = _deltas(model, x, y)[0]
    rule.step(x, y)
    # one solve: the damping holds the step, not the weights
    expected = (delta.t() @ a / len(a)) @ torch.linalg.inv(a.t() @ a / len(a) + 0.5 * torch.eye(7, dtype=a.dtype))
    assert relative(_whole(model[0]) - before, expected) < 1e-8


def test_bcd_memory_holds_what_is_left_of_all_deltas() -> None:
    """R = B - W A, whatever a learning-rate schedule makes of the step."""
    model = mlp(6, 5, 3)
    rule = _rule(model, Memory("bcd", damping=0.01, block=7))
    schedule = torch.optim.lr_scheduler.LambdaLR(rule.optimizers[0], lambda step: 0.5)
    accumulated = _accumulated(model, rule, 3)
    schedule.step()
    a, b, _ = accumulated[-1]
    left = (b - _whole(model[0]) @ a) / 24  # averaged over three batches of eight
    memory: Any = rule.solver.state_dict()["0"]
    assert relative(memory["moments"], a / 24) < 1e-10
    assert relative(memory["residual"], left) < 1e-8


@pytest.mark.parametrize("method", ["rls", "bcd"])
def test_state_round_trip(method: str) -> None:
    model = mlp(6, 5, 4, 3)
    batches = _batches(6)
    rule = _rule(model, Memory(method, refresh=3, output_lr=0.01))
    for x, y in batches[:4]:
        rule.step(x, y)
    saved, weights = copy.deepcopy(rule.state_dict()), state(model)
    twin = mlp(6, 5, 4, 3).double()
    twin.load_state_dict(weights)
    other = _rule(twin, Memory(method, refresh=3, output_lr=0.01))
    other.load_state_dict(saved)
    for x, y in batches[4:]:
        rule.step(x, y)
        other.step(x, y)
    assert equal(state(model), state(twin))
    assert equal(rule.solver.state_dict(), other.solver.state_dict())


@pytest.mark.parametrize("method", ["rls", "bcd"])
def test_a_loaded_state_is_not_written_by_later_steps(method: str) -> None:
    rule = _rule(mlp(6, 5, 3), Memory(method))
    batches = _batches(3)
    rule.step(*batches[0])
    saved = rule.solver.state_dict()
    kept = copy.deepcopy(saved)
    rule.solver.load_state_dict(saved)
    rule.step(*batches[1])
    assert equal(saved, kept)


def test_a_state_of_other_stages_is_refused() -> None:
    rule, other = _rule(mlp(6, 5, 3), Memory()), _rule(mlp(6, 5, 4, 3), Memory())
    with pytest.raises(ValueError, match=r"memories of stages \['0', '1', '2'\], this rule of"):
        rule.solver.load_state_dict(other.solver.state_dict())
    wider = _rule(mlp(6, 8, 3), Memory())
    with pytest.raises(ValueError, match=r"This state has moments \(9, 9\); stage '2' has \(6, 6\)"):
        rule.solver.load_state_dict(wider.solver.state_dict())


def test_accumulated_batches_are_one_batch() -> None:
    (x, y), (x2, y2) = _batches(2)
    model = mlp(6, 5, 3).double()
    twin = copy.deepcopy(model)
    parts, whole = (
        AltMin(m, nn.CrossEntropyLoss(), Memory(damping=0.1), code_solver="gradient") for m in (model, twin)
    )
    for _ in range(2):
        parts.backward(x, y, scale=0.5)
        parts.backward(x2, y2, scale=0.5)
        parts.update()
        whole.step(torch.cat([x, x2]), torch.cat([y, y2]))
    assert difference(model.parameters(), twin.parameters()) < 1e-10


@pytest.mark.parametrize("method", ["rls", "bcd"])
def test_stages_without_memory_train_by_the_rest(method: str) -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), Residual(8), nn.Linear(8, 3)
    )
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory(method, rest=partial(torch.optim.SGD, lr=0.125)))
    before = state(model)
    rule.step(*blobs(12))
    after = state(model)
    weights = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert all(not torch.equal(before[n], after[n]) for n in weights)
    assert [o.param_groups[0]["lr"] for o in rule.optimizers][-1] == 0.125
    held = [p for o in rule.optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))


def test_where_most_weights_have_no_memory_a_warning_says_what_trains_them() -> None:
    def build(memory: Memory) -> AltMin:
        return AltMin(nets.build("conv:4x2:bn", (1, 8, 8), 3), nn.CrossEntropyLoss(), memory)

    with pytest.warns(
        UserWarning, match=r"^\d+% of the weights have no memory and take Adam's steps with lr 0.003: those of "
    ):
        build(Memory())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(Memory(rest=partial(torch.optim.SGD, lr=0.1)))  # asked for
        AltMin(nets.build("lenet5", (1, 28, 28), 10), nn.CrossEntropyLoss(), Memory())


def test_grouped_convolutions_have_no_memory() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3))
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory())
    assert set(rule.solver.state_dict()) == {"0", "2"}
    rule.step(*images(6))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("method", ["rls", "bcd"])
def test_a_frozen_part_leaves_the_other_its_own_problem(method: str, frozen: str) -> None:
    model = mlp(6, 5, 3)
    getattr(model[0], frozen).requires_grad_(False)
    rule = _rule(model, Memory(method, lr=1.0, max_gain=None, damping=0.1, block=7))
    (x, y), *_ = _batches(1)
    before = _whole(model[0])
    a, delta = _deltas(model, x, y)[0]
    rule.step(x, y)
    change = _whole(model[0]) - before
    part = slice(0, 6) if frozen == "bias" else slice(6, 7)
    own = a[:, part]
    inverse = torch.linalg.inv(own.t() @ own / len(a) + 0.1 * torch.eye(own.shape[1], dtype=a.dtype))
    assert relative(change[:, part], (delta.t() @ own / len(a)) @ inverse) < 1e-8
    assert not bool(change[:, [6] if frozen == "bias" else list(range(6))].any())


def test_a_large_memory_is_announced_and_none_is_refused() -> None:
    with pytest.warns(UserWarning, match=r"Stage '0' has 7 inputs: its memory takes .* MiB.*limit=6"):
        AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), Memory(limit=6))
    blocks = nn.Sequential(Residual(6), Residual(6))
    with pytest.raises(UnsupportedModelError, match="Memory needs a stage that ends in a plain Linear or Conv"):
        AltMin(blocks, nn.CrossEntropyLoss(), Memory())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ridge"}, "method must be one of 'rls', 'bcd', got 'ridge'"),
        ({"lr": 0.0}, "lr must be a finite number > 0"),
        ({"max_gain": 0.0}, "max_gain must be a finite number > 0"),
        ({"damping": 0.0}, "damping must be a finite number > 0"),
        ({"damping": -1.0}, "damping must be a finite number > 0"),
        ({"forgetting": 1.0}, r"forgetting must be in \[0, 1\), got 1.0"),
        ({"forgetting": float("nan")}, r"forgetting must be in \[0, 1\)"),
        ({"refresh": 0}, "refresh must be an integer >= 1"),
        ({"sweeps": 0}, "sweeps must be an integer >= 1"),
        ({"block": 0}, "block must be an integer >= 1"),
        ({"limit": 0}, "limit must be an integer >= 1"),
        ({"output_lr": 0.0}, "output_lr must be a finite number > 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memory(**arguments)


@pytest.mark.parametrize("solver", [Memory, lambda: Memory("bcd")])
def test_one_solver_serves_one_rule(solver: Any) -> None:
    shared = solver()
    AltMin(mlp(6, 5, 4, 3), nn.CrossEntropyLoss(), shared)
    with pytest.raises((ValueError, RuntimeError), match="one rule"):
        AltMin(mlp(6, 5, 3), nn.CrossEntropyLoss(), shared)


def test_memory_learns_images() -> None:
    torch.manual_seed(0)
    rule = AltMin(convnet(), nn.CrossEntropyLoss(), Memory())
    x, y = images(30)
    losses = [float(rule.step(x, y).loss) for _ in range(20)]
    assert losses[-1] < 0.3 * losses[0]


def test_moments_that_rounding_makes_indefinite_get_the_damping_that_it_takes() -> None:
    torch.manual_seed(0)
    model = mlp(6, 5, 3)
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory(lr=0.1, damping=1e-9))
    x = 1e3 * torch.ones(20, 6) + 1e-3 * torch.randn(20, 6)  # 1e6 against 1e-6: seven digits do not hold both
    rule.step(x, torch.arange(20) % 3)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_moments_without_factorisation_are_refused_by_name_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = mlp(6, 5, 3)
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory())
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    rule.step(x, y)
    before = copy.deepcopy((state(model), rule.solver.state_dict()))
    assert isinstance(rule.solver, Memory)
    memory = list(rule.solver._stages.values())[1]
    monkeypatch.setattr(memory, "settings", Memory(damping=1e-9, refresh=1))
    monkeypatch.setattr(memory, "collect", lambda *_: setattr(memory, "pending", -torch.eye(6)))
    with pytest.raises(NonFiniteError, match="Stage '2': the second moments of its inputs have no factorisation"):
        rule.step(x, y)
    assert equal(before, (state(model), rule.solver.state_dict()))
