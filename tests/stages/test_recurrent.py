"""Recurrent stages: one code per time step with tied weights; with plain gradients, backpropagation through time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import SGD, assignments, jacobian, relative
from torch import Tensor, nn

from beyondprop import AltMin, Backprop, Chain, Codes, Descent, LearningRule, Memory
from beyondprop.credit import code_solvers
from beyondprop.nn import ElmanCell, Recurrent
from beyondprop.stages.block import BlockStage
from beyondprop.stages.recurrent import RecurrentPullback, RecurrentStage
from beyondprop.stages.time_steps import CellMoments

CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "elman": ElmanCell,
    "elman, relu": lambda i, h: ElmanCell(i, h, nn.ReLU()),
    "rnn": nn.RNNCell,
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}
HIDDEN, STEPS = 6, 5

every_cell = pytest.mark.parametrize("cell", list(CELLS))
every_output = pytest.mark.parametrize("outputs", ["last", "all"])


class _Drawing(nn.Module):
    """A cell with a mask and, where asked for, statistics of its own."""

    def __init__(self, inputs: int, units: int, norm: bool) -> None:
        super().__init__()
        self.input_size, self.hidden_size = inputs, units
        self.inner, self.drop = nn.GRUCell(inputs, units), nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(units) if norm else nn.Identity()

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.inner(x, self.drop(self.norm(state)))


def _net(cell: str, outputs: str = "last") -> Any:
    torch.manual_seed(0)
    read: list[nn.Module] = [nn.Linear(HIDDEN, 4)]
    if outputs == "all":
        read = [nn.Linear(HIDDEN, 2), nn.Flatten(), nn.Tanh(), nn.Linear(2 * STEPS, 4)]
    return nn.Sequential(Recurrent(CELLS[cell](3, HIDDEN), outputs), nn.Tanh(), *read).double()


def _batch(rows: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, STEPS, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (rows,), generator=generator)


def _train(rule: LearningRule, steps: int = 3) -> None:
    for _ in range(steps):
        rule.step(*_batch())


@every_cell
@every_output
def test_plain_gradients_are_backpropagation_through_time(cell: str, outputs: str) -> None:
    model = _net(cell, outputs)
    twin = copy.deepcopy(model)
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient")
    assert isinstance(rule.chain[0], RecurrentStage)
    _train(rule)
    _train(Backprop(twin, nn.CrossEntropyLoss(), SGD))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_layers_can_be_stacked_and_lie_above_other_stages() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * STEPS, 3 * STEPS),
        nn.Tanh(),
        nn.Unflatten(1, (STEPS, 3)),
        Recurrent(ElmanCell(3, 5), "all"),
        nn.ReLU(),
        Recurrent(nn.GRUCell(5, 4), "all"),
        nn.Dropout(0.0),
        Recurrent(nn.LSTMCell(4, 4)),
        nn.Linear(4, 4),
    ).double()
    twin = copy.deepcopy(model)
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient")
    assert [type(s).__name__ for s in rule.chain] == ["AffineStage", *["RecurrentStage"] * 3, "AffineStage"]
    _train(rule)
    _train(Backprop(twin, nn.CrossEntropyLoss(), SGD))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


SURROUNDED: dict[str, tuple[Callable[[], nn.Sequential], str, int]] = {
    "a norm in front": (
        lambda: nn.Sequential(
            *(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), Recurrent(ElmanCell(5, HIDDEN))),
            nn.Tanh(),
            nn.Linear(HIDDEN, 4),
        ),
        "linear",
        1,
    ),
    "batch norm in front": (
        lambda: nn.Sequential(
            *(nn.Flatten(), nn.BatchNorm1d(3 * STEPS), nn.Unflatten(1, (STEPS, 3)), Recurrent(nn.GRUCell(3, HIDDEN))),
            nn.Linear(HIDDEN, 4),
        ),
        "linear",
        0,
    ),
    "a nonlinearity at the end": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), Recurrent(nn.LSTMCell(5, 4)), nn.Softplus()),
        "linear",
        1,
    ),
    "a block": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Tanh(), Recurrent(ElmanCell(5, HIDDEN), "all")), nn.Tanh()),
            nn.Sequential(nn.Flatten(), nn.Linear(HIDDEN * STEPS, 4)),
        ),
        "block",
        0,
    ),
    "a block with weights behind": (
        lambda: nn.Sequential(
            nn.Linear(3, 5),
            nn.Sequential(
                nn.Tanh(), Recurrent(nn.GRUCell(5, HIDDEN), "all"), nn.Flatten(), nn.Linear(HIDDEN * STEPS, 4)
            ),
        ),
        "block",
        1,
    ),
}

surrounded = pytest.mark.parametrize("name", list(SURROUNDED))


@surrounded
def test_what_surrounds_a_layer_leaves_it_its_codes_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    build, cuts, index = SURROUNDED[name]
    model = build().double()
    twin = copy.deepcopy(model)
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient", cuts=cuts)
    stage = rule.chain[index]
    assert isinstance(stage, RecurrentStage)
    assert stage.couples_batch == (name == "batch norm in front")
    _train(rule)
    _train(Backprop(twin, nn.CrossEntropyLoss(), SGD))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@surrounded
def test_a_surrounded_layers_stage_agrees_with_autograd(name: str) -> None:
    torch.manual_seed(0)
    build, cuts, index = SURROUNDED[name]
    stage = Chain(build().double(), cuts)[index]
    z = torch.randn(7, STEPS, 5 if index else 3, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    output = copy.deepcopy(stage).forward(leaf)
    v, u = torch.randn_like(output), torch.randn_like(z)
    (pulled,) = torch.autograd.grad(output, leaf, v)
    twin = copy.deepcopy(stage)
    gradients = torch.autograd.grad(twin.forward(z), twin.parameters, v)
    with torch.no_grad():
        pullback = stage.record(z, push=True)
        pullback.add_gradients(v, -0.5)  # of a cotangent that was not pulled before
        assert relative(pullback(v), pulled) < 1e-11
        pullback.add_gradients(v, 1.5)  # of the one that was
        assert abs(float((v * pullback.push(u)).sum() - (pullback(v) * u).sum())) < 1e-10 * float(v.norm() * u.norm())
        head = pullback.pull_head(torch.randn(pullback.head_shape, dtype=torch.float64))
        assert head.shape == z.shape
        buffers = [b.clone() for m in stage.modules for b in m.buffers()]
        assert relative(pullback.at(z).output, output) < 1e-12
        pullback.relax(v, u, is_top=False)
        assert all(
            torch.equal(b, c) for b, c in zip(buffers, (c for m in stage.modules for c in m.buffers()), strict=True)
        )
    for p, g in zip(stage.parameters, gradients, strict=True):
        assert p.grad is not None
        assert relative(p.grad, g) < 1e-11


@pytest.mark.parametrize(
    "stage",
    [
        lambda: [nn.GroupNorm(1, STEPS), Recurrent(ElmanCell(3, HIDDEN))],
        lambda: [nn.Sequential(Recurrent(ElmanCell(3, 3), "all"), nn.Tanh(), Recurrent(ElmanCell(3, HIDDEN)))],
    ],
    ids=["beside a module without closed forms", "two in a block"],
)
def test_a_layer_that_loses_its_codes_says_so(stage: Callable[[], list[nn.Module]]) -> None:
    with pytest.warns(UserWarning, match=r"Stage '\d' is differentiated as a whole: its Recurrent has no codes"):
        chain = Chain(nn.Sequential(nn.Linear(3, 3), *stage(), nn.Linear(HIDDEN, 4)), "block")
    assert isinstance(chain[1], BlockStage)


@every_cell
@every_output
def test_pullback_push_and_the_stage_itself_agree_with_autograd(cell: str, outputs: str) -> None:
    model = _net(cell, outputs)
    stage = Chain(model)[0]
    z = _batch()[0]
    leaf = z.clone().requires_grad_()
    output = model[0](leaf)
    v, w, u = torch.randn_like(output), torch.randn_like(output), torch.randn_like(z)
    pulled, *gradients = torch.autograd.grad(output, [leaf, *stage.parameters], v, retain_graph=True)
    (other,) = torch.autograd.grad(output, leaf, w)
    with torch.no_grad():
        pullback = stage.record(z, push=True)
        assert relative(pullback.output, output) < 1e-12
        assert relative(pullback(v), pulled) < 1e-12
        assert relative(pullback(w), other) < 1e-12
        pullback.add_gradients(v, -0.5)
        v.mul_(2.0)
        pullback.add_gradients(v, 0.75)
        slope = (model[0](z + 1e-6 * u) - model[0](z - 1e-6 * u)) / 2e-6
        assert relative(pullback.push(u), slope) < 1e-7
        assert relative(pullback.at(z + u).output, model[0](z + u)) < 1e-12
    for p, g in zip(stage.parameters, gradients, strict=True):
        assert p.grad is not None
        assert relative(p.grad, g) < 1e-11


def _literal(model: nn.Sequential, x: Tensor, y: Tensor, damping: float, mu: float, normalize: bool) -> list[Tensor]:
    """Line search through time for an Elman net that shows its last state, with every Jacobian written out."""
    cell: Any = model[0].cell
    states = [x.new_zeros(len(x), HIDDEN)]
    for t in range(STEPS):
        states.append(cell(x[:, t], states[-1]).detach())
    read = model[1:]
    p = torch.softmax(read(states[-1]).detach(), 1)
    delta = nn.functional.one_hot(y, 4) - p
    deltas: list[Tensor] = []
    for t in range(STEPS, 0, -1):
        top = t == STEPS
        if top:
            j = jacobian(read, states[t])
        else:
            slope = 1 - torch.tanh(states[t]) ** 2 if isinstance(cell.activation, nn.Tanh) else (states[t] > 0).double()
            j = cell.weight_hh.detach() * slope.unsqueeze(1)
        g = (j.mT @ delta.unsqueeze(-1)).squeeze(-1)
        image = (j @ g.unsqueeze(-1)).squeeze(-1)
        curvature = (image**2).sum(1)
        if top:
            curvature = (p * image**2).sum(1) - (p * image).sum(1) ** 2
        factor = (g**2).sum(1) / ((mu if top else damping) * (g**2).sum(1) + curvature)
        delta = g * (factor / factor.mean() if normalize else factor).unsqueeze(1)
        deltas.append(delta)
    return deltas[::-1]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("cell", ["elman", "elman, relu"])
def test_the_sweep_through_time_is_the_literal_one(cell: str, normalize: bool) -> None:
    model, (x, y) = _net(cell), _batch()
    found = assignments(model, nn.CrossEntropyLoss(), Codes(damping=0.7, mu=1.3, normalize=normalize), x, y)
    pullback = found[-1].pullback
    assert isinstance(pullback, RecurrentPullback)
    expected = _literal(model, x, y, 0.7, 1.3, normalize)
    deltas = pullback.sweep(found[-1].delta)  # by the same solver
    for delta, literal in zip(deltas, expected, strict=True):
        torch.testing.assert_close(delta, literal.detach(), rtol=1e-9, atol=1e-12)


@every_cell
def test_a_question_from_below_leaves_the_swept_deltas(cell: str) -> None:
    model, (x, _) = _net(cell), _batch()
    found = []
    for asks in (False, True):
        pullback: Any = Chain(model).record(x).take(0)
        v = torch.linspace(-1, 1, pullback.output.numel(), dtype=torch.float64).view_as(pullback.output)
        pullback.sweep(v, lambda moment, delta, gradient: 0.3 * gradient)
        if asks:
            pullback(2 * v)
        model.zero_grad()
        pullback.add_gradients(v, 1.0)
        found.append([p.grad for p in model[0].parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_state_that_is_shown_hears_the_output_and_the_next_state() -> None:
    # One unit, one input: everything by hand. c2 = w x2 + u tanh(c1) + b; both are shown.
    model: Any = nn.Sequential(Recurrent(ElmanCell(1, 1), "all"), nn.Flatten(), nn.Linear(2, 1)).double()
    x, y = torch.randn(4, 2, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    credit = Codes(damping=0.4, normalize=False)
    recurrent = assignments(model, nn.MSELoss(), credit, x, y)[-1]
    pullback: Any = recurrent.pullback
    delta = recurrent.delta
    first, second = pullback.sweep(delta)
    torch.testing.assert_close(second, delta[:, 1])
    slope = model[0].cell.weight_hh.detach() * (1 - torch.tanh(pullback.states[1]) ** 2)
    # one unit: the line search is the exact minimiser of (second - slope d)^2 + 1.4 (delta - d)^2
    expected = (slope * second + 1.4 * delta[:, 0]) / (slope**2 + 1.4)
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("damping", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("solver", ["line_search", "cg", "exact", "gradient"])
def test_states_that_do_not_meet_take_the_delta_of_their_output_as_it_is(
    solver: str, normalize: bool, damping: float
) -> None:
    model: Any = nn.Sequential(Recurrent(ElmanCell(3, 4), "all"), nn.Flatten(), nn.Linear(4 * STEPS, 2)).double()
    nn.init.zeros_(model[0].cell.weight_hh)
    x, y = _batch()
    credit = Codes(solver, damping=damping, normalize=normalize)
    recurrent = assignments(model, nn.CrossEntropyLoss(), credit, x, y % 2)[-1]
    pullback: Any = recurrent.pullback
    torch.testing.assert_close(torch.stack(pullback.sweep(recurrent.delta), 1), recurrent.delta)


@every_cell
@every_output
@pytest.mark.parametrize("solver", ["line_search", "cg", "exact", "momentum"])
def test_codes_lower_the_relaxed_objective(cell: str, outputs: str, solver: str) -> None:
    x, y = _batch()
    chosen: Any = code_solvers.momentum(3, 0.1, features_mean=False) if solver == "momentum" else solver
    rule = AltMin(_net(cell, outputs), nn.CrossEntropyLoss(), SGD, code_solver=chosen, normalize=False, mu=4.0)
    result = rule.step(x, y, diagnostics=True)
    assert result.energy is not None
    assert float(result.energy) < float(result.loss) - 1e-4


@pytest.mark.parametrize("solver", ["line_search", "cg", "exact"])
@every_cell
@every_output
def test_a_recurrent_layer_at_the_end_lowers_the_objective_too(cell: str, outputs: str, solver: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Recurrent(CELLS[cell](3, 4), outputs)).double()
    x, y = _batch()
    # sum: twice as far along its gradient would lead beyond the minimum
    loss, target = (
        (nn.CrossEntropyLoss(), y)
        if outputs == "last"
        else (nn.MSELoss(reduction="sum"), torch.randn(7, STEPS, 4).double())
    )
    rule = AltMin(model, loss, SGD, code_solver=solver, normalize=False)
    result = rule.step(x, target, diagnostics=True)
    assert result.energy is not None
    assert float(result.energy) < float(result.loss)


def test_the_objective_of_two_steps_at_the_end_is_the_one_by_hand() -> None:
    # c2 = w x2 + u tanh(c1) + b is the output: c1 is the only code, and the loss sees what follows it.
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(1, 1), Recurrent(ElmanCell(1, 1))).double()
    x, y = torch.randn(4, 2, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    rule = AltMin(model, nn.MSELoss(), SGD, normalize=False, mu=0.7)
    (top, low) = found = assignments(model, nn.MSELoss(), Codes(normalize=False, mu=0.7), x, y)
    pullback: Any = top.pullback
    first = pullback.states[1] + pullback.sweep(top.delta)[0]
    with torch.no_grad():
        drive = model[0](x) + low.delta
        near = model[1].cell(drive[:, 0], torch.zeros(4, 1, dtype=torch.float64))
        after = model[1].cell(drive[:, 1], first)
        gaps = (first - near).square().sum() + low.delta.square().sum()
        expected = nn.functional.mse_loss(after, y) + 0.7 / 2 * gaps / 4
    torch.testing.assert_close(rule.credit.energy(found), expected, rtol=1e-12, atol=0)


@every_output
@pytest.mark.parametrize("place", ["cell", "cell.activation"])
def test_closed_forms_and_autograd_give_the_same_step(outputs: str, place: str) -> None:
    closed = _net("elman", outputs)
    hooked = copy.deepcopy(closed)
    hooked[0].get_submodule(place).register_forward_hook(lambda *_: None)  # what has hooks is left to autograd
    assert isinstance(Chain(hooked)[0].moments, CellMoments)  # type: ignore[attr-defined]
    for model in (closed, hooked):
        _train(AltMin(model, nn.CrossEntropyLoss(), SGD))
    for p, q in zip(closed.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("solver", ["line_search", "gradient"])
def test_the_published_order_and_local_steps_serve_recurrent_stages(solver: str) -> None:
    choices: list[dict[str, Any]] = [
        {"weight_solver": SGD, "weight_inputs": "new"},
        {"weight_solver": Descent(partial(torch.optim.SGD, lr=0.05), local_steps=3)},
    ]
    for settings in choices:
        model = _net("gru")
        start = {k: v.clone() for k, v in model.state_dict().items()}
        rule = AltMin(model, nn.CrossEntropyLoss(), code_solver=solver, **settings)
        losses = [float(rule.step(*_batch()).loss) for _ in range(30)]
        assert losses[-1] < 0.8 * losses[0]
        assert all(bool((v != start[k]).any()) for k, v in model.state_dict().items())


@every_output
@pytest.mark.parametrize("norm", [False, True])
def test_a_cells_masks_and_statistics_are_those_of_the_first_run(outputs: str, norm: bool) -> None:
    torch.manual_seed(0)
    layer = Recurrent(_Drawing(3, HIDDEN, norm), outputs).double()
    stage = RecurrentStage("s", [("0", nn.Dropout(0.3)), ("1", layer)])
    x, _ = _batch()
    with torch.no_grad():
        pullback = stage.record(x, push=True)
        buffers, drawn = [b.clone() for b in layer.buffers()], torch.get_rng_state()
        again = pullback.at(x)
        assert relative(again.output, pullback.output) < 1e-14
        v, u = torch.randn_like(again.output), torch.randn_like(x)
        torch.set_rng_state(drawn)
        assert relative(again(v), pullback(v)) < 1e-14
        assert relative(again.push(u), pullback.push(u)) < 1e-12
        output, far = pullback.relax(torch.zeros_like(pullback.output), None, is_top=False)
        assert not bool(far.any())  # nothing moved
        assert relative(output, pullback.output) < 1e-14
        before = {p: p.clone() for p in stage.parameters}
        assert not bool(pullback.relinearize(before)[1].any())
        layer.cell.inner.weight_hh.add_(0.1)
        fresh, change = pullback.relinearize(before)
        assert relative(fresh.output - pullback.output, change) < 1e-14
        assert torch.equal(torch.get_rng_state(), drawn)
        assert all(torch.equal(b, c) for b, c in zip(buffers, layer.buffers(), strict=True))


def test_frozen_parameters_stay_and_the_rest_trains() -> None:
    model = _net("elman")
    model[0].cell.weight_hh.requires_grad_(False)
    twin = copy.deepcopy(model)
    _train(AltMin(model, nn.CrossEntropyLoss(), SGD, code_solver="gradient"))
    _train(Backprop(twin, nn.CrossEntropyLoss(), SGD))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_layer_with_hooks_is_one_block() -> None:
    model = _net("elman")
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="its Recurrent has no codes for its time steps.*without hooks"):
        chain = Chain(model)
    assert isinstance(chain[0], BlockStage)


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 2), (4, 0, 3)])
def test_what_is_no_sequence_for_the_cell_is_refused(shape: tuple[int, ...]) -> None:
    model = _net("elman").float()
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD)
    with pytest.raises(ValueError, match=r"Recurrent takes sequences \(N, T, 3\) with T >= 1, got shape"):
        rule.step(torch.zeros(shape), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="Recurrent takes sequences"):
        model(torch.zeros(shape))


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="activation must be an elementwise module with a closed form"):
        ElmanCell(3, 4, nn.Softmax(1))
    with pytest.raises(ValueError, match=r"activation must not overwrite the state, got ReLU\(inplace=True\)"):
        ElmanCell(3, 4, nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="hidden_size must be an integer >= 1, got 0"):
        ElmanCell(3, 0)
    with pytest.raises(
        TypeError, match=r"cell must be a module with the attribute input_size, such as nn.GRUCell, got Linear"
    ):
        Recurrent(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"cell must do one time step, .* got GRU, which does all; take nn.GRUCell"):
        Recurrent(nn.GRU(3, 4, batch_first=True))
    with pytest.raises(ValueError, match="outputs must be one of"):
        Recurrent(nn.GRUCell(3, 4), "first")

    class Wide(nn.Module):
        input_size, hidden_size = 3, 4

        def forward(self, x: Tensor, state: Tensor) -> Any:
            return torch.cat([state, state], 1) if len(x) > 1 else (state, state)

    with pytest.raises(ValueError, match=r"Wide must return the next state, .* shape \(2, 4\), got shape \(2, 8\)"):
        Recurrent(Wide())(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"Wide must return the next state, .* shape \(1, 4\), got tuple"):
        Recurrent(Wide())(torch.zeros(1, 5, 3))


def test_beside_a_memory_a_recurrent_stage_trains_by_the_rest_optimizer() -> None:
    model = _net("gru")
    rule = AltMin(model, nn.CrossEntropyLoss(), Memory(rest=SGD))
    assert [len(o.param_groups[0]["params"]) for o in rule.optimizers] == [2, 4]
    losses = [float(rule.step(*_batch()).loss) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_identity_start_is_the_published_one() -> None:
    cell = ElmanCell(2, 5, nn.ReLU(), identity=True)
    assert torch.equal(cell.weight_hh, torch.eye(5))
    assert not cell.bias.any()
    assert float(cell.weight_ih.detach().abs().max()) < 0.01
