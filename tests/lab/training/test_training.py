from __future__ import annotations

import copy
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop import AltMin, Backprop, Memory, NonFiniteError
from beyondprop.lab.tasks import evaluate
from beyondprop.lab.training import fit, schedules, work_per_step
from beyondprop.rules.base import LearningRule, StepResult


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_data(rows: int = 60, test_rows: int = 30, classes: int = 3) -> Any:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows + test_rows, 6, generator=g)
    y = x[:, :classes].argmax(1)
    return SimpleNamespace(x_train=x[:rows], y_train=y[:rows], x_test=x[rows:], y_test=y[rows:])


def make_net(*, norm: bool = False) -> nn.Sequential:
    middle: list[nn.Module] = [nn.BatchNorm1d(8), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3))


def sgd(model: nn.Module, lr: float = 0.1) -> Backprop:
    return Backprop(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=lr))


class Spy(Backprop):
    """Backpropagation that notes what the loop gives it."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), **options)
        self.seen: list[Tensor] = []
        self.rates: list[float] = []
        self.epochs = 0

    def step(self, x: Tensor, y: Tensor, *, diagnostics: bool = False) -> StepResult:
        self.seen.append(x.clone())
        self.rates.append(self.optimizers[0].param_groups[0]["lr"])
        return super().step(x, y, diagnostics=diagnostics)

    def end_epoch(self) -> None:
        self.epochs += 1

    def __deepcopy__(self, memo: Any) -> Spy:
        return Spy(copy.deepcopy(self.model, memo))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]),
        ("halve:1", [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]),
        ("halve:3", [1, 1, 1, 1, 1, 1, 0.5, 0.5]),
    ],
)
def test_schedule_reaches_every_step(name: str, expected: list[float]) -> None:
    rule = Spy(make_net())
    fit(rule, make_data(), epochs=4, batch_size=30, schedule=name)
    assert rule.rates == pytest.approx([0.1 * f for f in expected])


@pytest.mark.parametrize("name", ["linar", "halve", "halve:0", "halve:x", "linear:3", ""])
def test_unknown_schedule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of constant, linear, cosine, halve:N"):
        schedules.factor(name, 10, 2)


def test_typo_in_a_schedule_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"perhaps you meant 'linear'"):
        schedules.factor("linar", 10, 2)


def test_evaluation_by_hand_and_modes_restored() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return x

    model = nn.Sequential(Fixed(), nn.Dropout(0.9))
    model[1].eval()
    x = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    y = torch.tensor([0, 1, 1])
    found = evaluate(model, (x, y), nn.CrossEntropyLoss())
    assert found["loss"] == pytest.approx(-(math.log(0.5) + math.log(0.75) + math.log(0.1)) / 3, rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert model[0].training
    assert not model[1].training
    summed = evaluate(model, (x, y), nn.CrossEntropyLoss(reduction="sum"))
    assert summed["loss"] == pytest.approx(found["loss"])


def test_evaluation_in_slices_counts_every_row_once() -> None:
    data = make_data(rows=10, test_rows=2500)
    model = make_net()
    found = evaluate(model, (data.x_test, data.y_test), nn.CrossEntropyLoss())
    with torch.no_grad():
        output = model(data.x_test)
    assert found["loss"] == pytest.approx(float(nn.CrossEntropyLoss()(output, data.y_test)), rel=1e-5)
    assert found["accuracy"] == int((output.argmax(1) == data.y_test).sum()) / 2500


def test_rows_of_a_run() -> None:
    data, rule = make_data(rows=50), Spy(make_net())
    logged: list[dict[str, Any]] = []
    history = fit(rule, data, epochs=2.5, batch_size=20, schedule="constant", log=logged.append)
    assert logged == history.rows
    assert [r["kind"] for r in history.rows] == ["eval"] * 4 + ["finished"]
    evaluations = history.evaluations
    assert [r["step"] for r in evaluations] == [0, 3, 6, 8]
    assert [r["samples"] for r in evaluations] == [0, 50, 100, 140]
    assert [r["epoch"] for r in evaluations] == pytest.approx([0, 1, 2, 8 / 3])
    assert [r["work"] for r in evaluations] == [0, 3, 6, 8]
    assert evaluations[0]["train_loss"] is None
    assert evaluations[0]["seconds"] == 0
    assert evaluations[-1]["seconds"] > evaluations[1]["seconds"] > 0
    assert rule.epochs == 2
    assert len(rule.seen) == 8
    assert [len(x) for x in rule.seen] == [20, 20, 10, 20, 20, 10, 20, 20]


def test_train_loss_is_the_mean_over_rows_since_the_last_evaluation() -> None:
    data, model = make_data(rows=50), make_net()
    frozen = Backprop(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.0))
    history = fit(frozen, data, epochs=2, batch_size=20, schedule="constant")
    expected = evaluate(model, (data.x_train, data.y_train), nn.CrossEntropyLoss())["loss"]
    assert [r["train_loss"] for r in history.evaluations[1:]] == pytest.approx([expected] * 2, rel=1e-5)


def test_fraction_of_an_epoch() -> None:
    history = fit(sgd(make_net()), make_data(), epochs=0.5, batch_size=10)
    assert [r["step"] for r in history.evaluations] == [0, 3]
    assert history.evaluations[-1]["epoch"] == 0.5


def test_evaluate_every_some_steps_and_at_the_end() -> None:
    history = fit(sgd(make_net()), make_data(), epochs=1, batch_size=6, evaluate_every=4)
    assert [r["step"] for r in history.evaluations] == [0, 4, 8, 10]


def test_batches_depend_on_seed_and_epoch_only() -> None:
    data, first, second, other = make_data(), Spy(make_net()), Spy(make_net(norm=True)), Spy(make_net())
    fit(first, data, epochs=2, batch_size=20, seed=5)
    torch.manual_seed(99)
    fit(second, data, epochs=2, batch_size=20, seed=5, alignment=True, evaluate_every=1)
    fit(other, data, epochs=2, batch_size=20, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.seen, second.seen, strict=True))
    assert not torch.equal(first.seen[0], first.seen[3])
    assert not torch.equal(first.seen[0], other.seen[0])
    for epoch in (first.seen[:3], first.seen[3:]):
        assert torch.equal(torch.cat(epoch).sort(0).values, data.x_train.sort(0).values)


def test_last_batch_of_one_row_is_left_out_for_batch_norm_only() -> None:
    data = make_data(rows=41)
    normed, plain = Spy(make_net(norm=True)), Spy(make_net())
    history = fit(normed, data, epochs=2, batch_size=10)
    fit(plain, data, epochs=1, batch_size=10)
    assert [len(x) for x in normed.seen] == [10] * 8
    assert [r["samples"] for r in history.evaluations] == [0, 40, 80]
    assert [r["epoch"] for r in history.evaluations] == [0, 1, 2]
    assert [len(x) for x in plain.seen] == [10] * 4 + [1]


def test_work_of_backpropagation_is_one_and_of_a_line_search_more() -> None:
    data, model = make_data(), make_net()
    batch = data.x_train[:20], data.y_train[:20]
    plain, searched = sgd(model), AltMin(make_net(), nn.CrossEntropyLoss())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    assert work_per_step(plain, *batch) == 1.0
    assert 1.0 < work_per_step(searched, *batch) < 2.0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plain.watchdog.steps == 0


def test_measuring_work_draws_no_random_number() -> None:
    data = make_data()
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    random = torch.get_rng_state()
    assert work_per_step(sgd(model), data.x_train[:20], data.y_train[:20]) == 1.0
    assert torch.equal(torch.get_rng_state(), random)


def test_work_counts_the_factorisations_of_a_memory() -> None:
    # By hand for a 6-8-3 net with biases and batch 20; torch counts 2 for a multiplication with its addition.
    data = make_data()
    rule = AltMin(make_net(), nn.CrossEntropyLoss(), Memory(refresh=10), code_solver="gradient")
    plain = 2 * 20 * (6 * 8 * 2 + 8 * 3 * 3)
    moments = 2 * 20 * (7 * 7 + 9 * 9)
    steps = 2 * (8 * 7 * 7 + 3 * 9 * 9)
    factors = sum(n**3 // 3 + 2 * n**3 // 3 for n in (7, 9)) / 10
    expected = 1 + (moments + steps + factors) / plain
    assert work_per_step(rule, data.x_train[:20], data.y_train[:20]) == pytest.approx(expected, rel=1e-9)


def test_alignment_rows_at_every_evaluation() -> None:
    history = fit(sgd(make_net()), make_data(), epochs=2, batch_size=30, alignment=True)
    rows = [r for r in history.rows if r["kind"] == "alignment"]
    assert [r["step"] for r in rows] == [0, 2, 4]
    for row in rows:
        assert list(row["stages"]) == ["0", "2"]
        assert all(s["cosine"] == pytest.approx(1.0) for s in row["stages"].values())


def test_looking_changes_nothing() -> None:
    results = []
    for looks in ({}, {"alignment": True, "evaluate_every": 1, "progress": lambda *_: None}):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        fit(AltMin(model, nn.CrossEntropyLoss()), make_data(), epochs=2, batch_size=20, **looks)
        results.append(model.state_dict())
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_regression_has_a_loss_and_no_accuracy() -> None:
    data = make_data()
    data.y_train, data.y_test = data.x_train[:, :2] * 2, data.x_test[:, :2] * 2
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    history = fit(Backprop(model, nn.MSELoss(), torch.optim.Adam), data, epochs=2, batch_size=20)
    assert all("accuracy" not in r for r in history.evaluations)
    assert history.evaluations[-1]["loss"] < history.evaluations[0]["loss"]
    with torch.no_grad():
        output = model(data.x_test)
    assert history.evaluations[-1]["loss"] == pytest.approx(float(nn.MSELoss()(output, data.y_test)), rel=1e-5)


def test_early_stop_after_patience_without_improvement() -> None:
    model = make_net()
    frozen = Backprop(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.0))
    history = fit(frozen, make_data(), epochs=20, batch_size=20, early_stop=3)
    assert history.stopped_early
    assert [r["step"] for r in history.evaluations] == [0, 3, 6, 9]
    assert history.rows[-1] == {"kind": "finished", "step": 9, "epoch": 3.0, "stopped_early": True}


def test_early_stop_waits_while_it_improves() -> None:
    data = make_data()
    data.y_train, data.y_test = data.x_train[:, :2] * 2, data.x_test[:, :2] * 2
    model = nn.Sequential(nn.Linear(6, 2))
    rule = Backprop(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.01))
    history = fit(rule, data, epochs=10, batch_size=20, early_stop=1)
    assert not history.stopped_early
    assert len(history.evaluations) == 11


def test_nan_in_the_data_is_a_failed_row_and_an_error() -> None:
    data = make_data()
    data.x_train[40, 2] = math.nan
    logged: list[dict[str, Any]] = []
    with pytest.raises(NonFiniteError, match=r"x is not finite"):
        fit(sgd(make_net()), data, epochs=3, batch_size=10, log=logged.append)
    assert logged[-1]["kind"] == "failed"
    assert "x is not finite" in logged[-1]["message"]
    assert 0 <= logged[-1]["step"] < 6
    assert all(math.isfinite(r["work"]) for r in logged[:-1] if r["work"] is not None)


def test_non_finite_test_loss_is_null() -> None:
    data = make_data()
    data.x_test[3, 0] = math.nan
    assert fit(sgd(make_net()), data, epochs=1, batch_size=20).evaluations[-1]["loss"] is None


class Complaining(Spy):
    def step(self, x: Tensor, y: Tensor, *, diagnostics: bool = False) -> StepResult:
        if len(self.seen) in (2, 4):
            warnings.warn("the wish vanishes", UserWarning, stacklevel=1)
        return super().step(x, y, diagnostics=diagnostics)


def test_warnings_are_recorded_once_and_still_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        history = fit(Complaining(make_net()), make_data(), epochs=2, batch_size=20)
    assert [str(w.message) for w in shown] == ["the wish vanishes"] * 2
    rows = [r for r in history.rows if r["kind"] == "warning"]
    assert rows == [{"kind": "warning", "step": 2, "epoch": 2 / 3, "message": "the wish vanishes"}]


def test_progress_ends_at_the_last_step() -> None:
    told: list[tuple[int, int]] = []
    fit(sgd(make_net()), make_data(), epochs=2, batch_size=20, progress=lambda *p: told.append(p))
    assert told[0] == (0, 6)
    assert told[-1] == (6, 6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"epochs": 0}, r"epochs must be a finite number > 0, got 0"),
        ({"epochs": math.inf}, r"epochs must be a finite number"),
        ({"batch_size": 0}, r"batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, r"seed must be an integer >= 0"),
        ({"evaluate_every": 0}, r"evaluate_every must be an integer >= 1"),
        ({"early_stop": 0}, r"early_stop must be an integer >= 1"),
        ({"schedule": "steps"}, r"schedule must be one of"),
        ({"save_every": 0}, r"save_every must be"),
    ],
)
def test_bad_arguments_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(sgd(make_net()), make_data(), **{"epochs": 1, "batch_size": 10, **bad})


def test_one_row_and_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BatchNorm needs 2 or more"):
        fit(sgd(make_net(norm=True)), make_data(rows=1), epochs=1, batch_size=10)


def test_a_rule_of_ones_own_trains_too() -> None:
    class SignDescent(LearningRule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, nn.CrossEntropyLoss())
            self.optimizers = (torch.optim.SGD(model.parameters(), lr=0.01),)

        def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, diagnostics: bool = False) -> StepResult:
            output = self.model(x)
            loss = self.loss(output, y)
            loss.backward()
            for p in self.model.parameters():
                assert p.grad is not None
                p.grad.sign_()
            return StepResult(loss.detach(), output.detach())

    evaluations = fit(SignDescent(make_net()), make_data(), epochs=10, batch_size=20).evaluations
    assert evaluations[-1]["accuracy"] > evaluations[0]["accuracy"]


@pytest.mark.parametrize("rows", [600, 3000])
def test_evaluate_of_batchmean_is_the_mean_over_samples(rows: int) -> None:
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1)), nn.KLDivLoss(reduction="batchmean")
    x, y = torch.randn(rows, 5), torch.rand(rows, 3).softmax(1)
    assert evaluate(model, (x, y), loss)["loss"] == pytest.approx(float(loss(model(x), y).detach()), rel=1e-5)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)])
def test_evaluate_leaves_ignored_rows_out(loss: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(3000, 5), torch.randint(3, (3000,))
    y[:1500:2] = -100
    kept = y != -100
    found = evaluate(model, (x, y), loss)
    assert found["accuracy"] == pytest.approx(float((model(x).argmax(1) == y)[kept].float().mean()), rel=1e-6)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", [nn.SmoothL1Loss(), nn.MSELoss(), F.l1_loss, lambda o, t: (o - t).square().mean()])
def test_evaluate_refuses_targets_that_broadcast(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"y has shape \(20,\), the output \(20, 1\)"):
        evaluate(nn.Linear(5, 1), (torch.randn(20, 5), torch.randn(20)), loss)


def test_evaluations_answer_to_the_names_of_older_versions() -> None:
    row = fit(sgd(make_net()), make_data(), epochs=0.5, batch_size=10).evaluations[-1]
    assert row["test_accuracy"] == row["validation_accuracy"] == row["accuracy"]
    assert "test_accuracy" not in row
    with pytest.raises(KeyError, match="test_r2"):
        row["test_r2"]
