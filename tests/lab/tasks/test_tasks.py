"""Tasks: their numbers against scikit-learn and by hand, rows held out, what is refused, and what `fit` and `evaluate` take."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ADAM, mlp
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from beyondprop import AltMin, Backprop, data, evaluate, fit
from beyondprop.lab import Settings, Task, compare, tasks
from beyondprop.lab.report import read_run
from beyondprop.lab.tasks import AddingTask, Regression, RowsTask


def rows(count: int = 60) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :2].sum(1, keepdim=True)


def test_r_squared_is_scikit_learns_over_several_targets_and_parts() -> None:
    x = torch.randn(2500, 3)
    y = torch.cat([x[:, :1] * 2, torch.full((2500, 1), 3.0), x[:, 1:2] + 5], 1)
    model = nn.Linear(3, 3)
    kind = Regression()
    task = RowsTask(name="t", x_train=x, y_train=y, x_test=x, y_test=y, kind=kind, outputs=3)
    with torch.no_grad():
        expected = r2_score(y.double().numpy(), model(x).double().numpy())
    assert task.evaluate(model)["r2"] == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        assert task.evaluate(model)["loss"] == pytest.approx(float((model(x) - y).square().mean()), rel=1e-6)


def test_the_autoencoders_loss_is_summed_over_pixels_and_averaged_over_images() -> None:
    task = tasks.load("autoencoder:digits")
    model = task.net("autoencoder")
    with torch.no_grad():
        logits = model(task.x_test)  # type: ignore[attr-defined]
    y = task.y_test  # type: ignore[attr-defined]
    expected = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1).mean()
    assert task.evaluate(model)["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert float(task.x_train.min()) == 0.0
    assert float(task.x_train.max()) == 1.0


def test_forgetting_comes_from_all_evaluations() -> None:
    task: Any = tasks.load("split:digits")
    names = [f"accuracy on {part.name}" for part in task.parts]
    matrix = [[0.9, 0.2, 0.1, 0.1, 0.1], [0.5, 0.8, 0.1, 0.1, 0.1]]
    evaluations = [dict.fromkeys(names, 0.1), *(dict(zip(names, row, strict=True)) for row in matrix)]
    assert task.over(evaluations)["forgetting"] == pytest.approx(0.4)
    assert task.over(evaluations[:2])["forgetting"] == 0.0


def test_two_seeds_of_the_adding_problem_share_no_sequence() -> None:
    task = AddingTask(20)
    assert not torch.equal(task.drawn(1).rows[0], task.drawn(2).rows[0])
    pairs = list(task.batches(1, 3200, 0))
    later = list(task.batches(1, 3200, 0, 1))
    assert torch.equal(pairs[1][0], later[0][0])
    assert not torch.equal(pairs[0][0], next(iter(task.batches(0, 3200, 0)))[0])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("digist", r"data must be one of .*; got 'digist'; perhaps you meant 'digits'"),
        ("autoencoder:diabetes", "takes images"),
        ("adding:long", "takes a whole number of steps"),
        ("split:digits:halves", "option of task split must be one of"),
        ("permuted:digits:tasks=0", "tasks=N takes a whole number from 1 to 1000, got '0'"),
        ("permuted:digits:tasks=" + "9" * 30, "tasks=N takes a whole number from 1 to 1000"),
        ("permuted:digits:rows=" + "9" * 30, "rows=N takes a whole number from 1 to 1000000000"),
        ("regression:digits", "task regression"),
    ],
)
def test_forms_that_are_none_are_refused(form: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tasks.load(form)


def test_a_net_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"net 'mine' does not fit 'digits': its output is \(N, 3\); 10 classes need"):
        tasks.check_net(tasks.load("digits"), nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "mine")
    with pytest.raises(
        ValueError, match=r"net 'mine' does not fit 'diabetes': its output is \(N\); the targets are \(N, 1\)"
    ):
        tasks.check_net(tasks.load("diabetes"), nn.Sequential(nn.Linear(10, 1), nn.Flatten(0)), "mine")
    with pytest.raises(ValueError, match=r"net 'mine' does not take inputs of shape \(1, 8, 8\)"):
        tasks.check_net(tasks.load("digits"), nn.Linear(64, 10), "mine")


def test_fit_takes_tensors_without_test_rows() -> None:
    history = fit(Backprop(mlp(6, 8, 1), nn.MSELoss(), ADAM), rows(), epochs=2, batch_size=7)
    assert [set(row) & {"loss", "accuracy"} for row in history.evaluations] == [set()] * 3
    assert history.evaluations[-1]["samples"] == 120


FUNCTIONS: dict[str, Any] = {
    "sum": lambda z, y: (z - y).square().sum(),
    "partial sum": partial(F.mse_loss, reduction="sum"),
    "root": lambda z, y: (z - y).square().mean().sqrt(),
    "weighted": lambda z, y: ((z - y).square() * y.abs()).sum() / y.abs().sum(),
    "module": nn.PairwiseDistance(),
    "mean": F.mse_loss,
    "mean of its own": lambda z, y: (z - y).abs().mean(),
    "says it": nn.MSELoss(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_is_what_it_is_on_all_rows(name: str) -> None:
    model, loss = nn.Linear(6, 1), FUNCTIONS[name]
    if name == "module":
        loss = _Mean(loss)
    x, y = rows(2500)
    right = float(loss(model(x), y).detach())
    loader = DataLoader(TensorDataset(x, y), batch_size=700)
    for given in ((x, y), loader, SimpleNamespace(x_train=x, y_train=y, x_test=x, y_test=y)):
        assert evaluate(model, given, loss)["loss"] == pytest.approx(right, rel=1e-5)
    for training, test in ((loader, loader), (loader, (x, y)), ((x, y), (x, y))):
        rule = Backprop(copy.deepcopy(model), loss, partial(torch.optim.SGD, lr=0.0))
        assert fit(rule, training, test=test, epochs=1).evaluations[-1]["loss"] == pytest.approx(right, rel=1e-5)


class _Mean(nn.Module):
    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.distance(z, y).mean() + self.distance(z[:1], y[:1]).sum()


def test_a_loss_on_batches_of_several_lengths_says_how_it_reduces() -> None:
    batches = [(torch.randn(3, steps, 6), torch.zeros(3, steps, 1)) for steps in (4, 5)]

    def own(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().mean()

    with pytest.raises(ValueError, match=r"shapes \[\(\(4, 1\), \(4, 1\)\), .*Set its attribute reduction"):
        evaluate(nn.Linear(6, 1), batches, own)
    own.reduction = "mean"  # type: ignore[attr-defined]
    assert evaluate(nn.Linear(6, 1), batches, own)["loss"] > 0


def test_evaluate_takes_a_data_set_as_fit_does() -> None:
    digits = data.load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert evaluate(model, digits) == evaluate(model, (digits.x_test, digits.y_test))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (SimpleNamespace(x_train=1, y_train=2), ValueError, r"SimpleNamespace has no test rows .*rows\.x_train"),
        (TensorDataset(*rows()), TypeError, "a pair of tensors .*, or a DataLoader; got TensorDataset"),
        (rows()[0], TypeError, "got Tensor"),
        ({"x": rows()[0]}, TypeError, "got dict"),
        (None, TypeError, "got NoneType"),
        (3.0, TypeError, "got float"),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused_by_name(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(nn.Linear(6, 1), given)


@pytest.mark.parametrize(
    ("training", "test", "message"),
    [
        (DataLoader(TensorDataset(*rows())), data.load("digits"), r"\(x, y\) or a DataLoader, got Dataset"),
        (rows(), DataLoader(TensorDataset(*rows())), r"a pair of tensors \(x, y\), got DataLoader"),
        (rows(), rows()[:1], "got 1 parts"),
        (SimpleNamespace(x_train=rows()[0], y_train=rows()[1]), rows(), "a SimpleNamespace has its own test rows"),
        (tasks.load("digits"), rows(), "has its own test rows"),
    ],
)
def test_test_rows_that_are_none_are_refused_by_name(training: Any, test: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fit(Backprop(nn.Linear(6, 1), nn.MSELoss(), ADAM), training, test=test, epochs=1)


def test_fit_takes_a_loader_as_it_takes_tensors() -> None:
    x, y = rows()
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        rule = Backprop(mlp(6, 8, 1), nn.MSELoss(), ADAM)
        history = fit(rule, loader, test=(x, y), epochs=3, seed=seed)
        assert history.evaluations[-1]["step"] == 27
        assert evaluate(rule.model, (x, y), nn.MSELoss())["loss"] == history.evaluations[-1]["loss"]
        assert evaluate(rule.model, loader, nn.MSELoss())["loss"] == pytest.approx(
            history.evaluations[-1]["loss"], rel=1e-5
        )
        found.append(history.evaluations[-1]["loss"])
    assert found[0] == found[1] != found[2]


class _Named(nn.Module):
    """Takes a dict, or a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 1)

    def forward(self, batch: Any) -> Tensor:
        return self.inner(batch["x"] if isinstance(batch, dict) else batch[0] + batch[1])


class _Dicts(torch.utils.data.Dataset[Any]):
    def __init__(self, *, pair: bool) -> None:
        self.x, self.y = rows()
        self.pair = pair

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        x = self.x[index]
        return (x, x) if self.pair else {"x": x}, self.y[index]


@pytest.mark.parametrize("pair", [False, True])
def test_backprop_hands_on_what_the_model_takes_and_stages_refuse_it(pair: bool) -> None:
    loader = DataLoader(_Dicts(pair=pair), batch_size=10)
    history = fit(Backprop(_Named(), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1)), loader, test=loader, epochs=5)
    assert history.evaluations[-1]["loss"] < 0.5 * history.evaluations[0]["loss"]
    with pytest.raises(TypeError, match="AltMin takes the inputs of a batch as one tensor, got"):
        fit(AltMin(mlp(6, 8, 1), nn.MSELoss()), loader, epochs=1)


def test_what_cannot_be_trained_on_is_refused() -> None:
    rule = Backprop(mlp(6, 8, 1), nn.MSELoss(), ADAM)
    with pytest.raises(TypeError, match="data must be a task, a data set"):
        fit(rule, [1, 2, 3], epochs=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        fit(rule, rows(), epoch=1)


class _Counting(nn.Module):
    """Counts its forward calls."""

    def __init__(self, costly: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.counters = {"calls": 0}
        self.costly = costly

    def forward(self, x: Tensor) -> Tensor:
        self.counters["calls"] += 1
        return self.inner(x)


def test_counters_are_recorded_and_a_costly_model_is_never_run_on_the_side(tmp_path: Path) -> None:
    made: list[_Counting] = []

    def net(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        made.append(_Counting(True))
        return made[-1]

    settings = Settings(rules=("adam",), epochs=1, seeds=(0,))
    run = read_run(compare(settings, nets={"counting": net}, out=tmp_path / "run"))
    rows = run.of("eval", "adam", 0)
    per_evaluation = 1  # 360 test rows are one part
    assert rows[0]["counters"] == {"calls": per_evaluation}
    assert rows[-1]["counters"] == {"calls": 29 + 2 * per_evaluation}
    assert not run.of("alignment", "adam", 0)
    assert rows[-1]["work"] == 29.0
    assert run.counters == ("calls",)
    assert sum(model.counters["calls"] for model in made) == 29 + 2 * per_evaluation


def test_a_table_and_a_net_of_ones_own_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.datasets import load_wine

    from beyondprop.cli import main

    monkeypatch.chdir(tmp_path)
    wine: Any = load_wine()
    lines = [",".join([*wine.feature_names, "quality"])]
    names = ("low", "medium", "high")
    lines += [",".join([*map(repr, map(float, x)), names[y]]) for x, y in zip(wine.data, wine.target, strict=True)]
    Path("wine.csv").write_text("\n".join(lines) + "\n")
    Path("mine.py").write_text(
        "from torch import nn\n\n\ndef build(input_shape, outputs):\n"
        "    return nn.Sequential(nn.Linear(input_shape[0], 16), nn.Tanh(), nn.Linear(16, outputs))\n"
    )
    command = [
        "compare",
        "--data",
        "wine.csv:target=quality",
        "--net",
        "mine.py:build",
        "--epochs",
        "40",
        "--seeds",
        "1",
    ]
    assert main([*command, "--rule", "am-adam", "--rule", "adam", "--json", "--out", "run"]) == 0
    assert '"metric": "accuracy"' in (out := capsys.readouterr().out)
    assert '"name": "wine.csv"' in out
    last = read_run("run").of("eval", "adam", 0)[-1]
    assert last["accuracy"] > 0.9
    assert main([*command[:2], "wine.csv:target=color", *command[3:]]) == 2
    assert "color" in capsys.readouterr().err
    Path("mine.py").write_text(
        "from torch import nn\n\n\ndef build(input_shape, outputs):\n    return nn.Linear(13, 2)\n"
    )
    assert main([*command, "--rule", "adam", "--out", "other"]) == 2
    assert "3 classes need (N, 3)" in capsys.readouterr().err
    assert not Path("other").exists()


def test_nets_and_tasks_handed_over_are_compared(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(200, 4))
    task = Task.from_arrays(x, x[:, :2], name="two")  # type: ignore[attr-defined]
    model = nn.Linear(4, 2)
    before = model.weight.detach().clone()
    settings = Settings(rules=("adam",), epochs=3, seeds=(0, 1))
    path = compare(settings, task=task, nets={"line": model}, out=tmp_path / "run")
    run = read_run(path)
    assert torch.equal(model.weight, before)
    assert (run.task, run.metric.key, run.config["nets"]) == ("two", "r2", ["line"])
    first = [run.of("eval", "adam", seed)[0]["r2"] for seed in (0, 1)]
    assert first[0] == first[1]


def test_a_data_set_without_test_rows_needs_validation(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(200, 4))
    task = Task.from_arrays(x, x[:, 0], test=None)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has no test rows to compare on; use validation"):
        compare(Settings(rules=("adam",), epochs=1, seeds=(0,)), task=task, out=tmp_path / "a")
    compare(Settings(rules=("adam",), epochs=1, seeds=(0,), validation=True), task=task, out=tmp_path / "b")
    assert data.names()[0] == "diabetes"


def test_a_stream_is_never_shown_whole(tmp_path: Path) -> None:
    from beyondprop import BCD
    from beyondprop.data import SplitStream
    from beyondprop.lab import run_stream

    settings = Settings(task="split", rules=("adam", "bcd"), seeds=(0,))
    with pytest.raises(
        ValueError, match="split:digits shows its rows in batches of its own; bcd takes the whole set a step"
    ):
        compare(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    rule = BCD(nn.Sequential(nn.Flatten(), *mlp(64, 8, 10)), nn.CrossEntropyLoss(), output_loss="squared")
    with pytest.raises(ValueError, match="BCD takes the whole training set at every step"):
        run_stream(rule, SplitStream(data.load("digits")))
    with pytest.raises(ValueError, match="BCD takes the whole training set at every step"):
        fit(rule, DataLoader(TensorDataset(torch.randn(8, 64), torch.arange(8))), epochs=1)


@pytest.mark.filterwarnings("ignore:adam. Tuning chose")
def test_a_stream_ends_with_its_tasks_and_forgets_in_every_row(tmp_path: Path) -> None:
    task: Any = tasks.load("split:digits")
    rule = Backprop(task.net("mlp:8x1"), task.loss, ADAM)
    with pytest.raises(ValueError, match="epochs must be at most 5, the tasks of split:digits, got 6"):
        fit(rule, task, epochs=6, batch_size=50)
    rows = fit(rule, task, epochs=2.5, batch_size=50, evaluate_every=2).evaluations
    assert all("forgetting" in row for row in rows)
    settings = Settings(task="split", rules=("adam",), seeds=(0,), tune=True, tune_epochs=0.5, epochs=0.5)
    found = read_run(compare(settings, out=tmp_path / "run"))
    assert all("forgetting" in row for row in found.rows if row["kind"] in ("eval", "tuning"))
    with pytest.raises(ValueError, match="tune_epochs must be at most 5"):
        compare(Settings(task="split", rules=("adam",), tune=True, tune_epochs=6), out=tmp_path / "other")


def test_a_look_at_a_loader_changes_no_training_and_no_random_number() -> None:
    x, y = rows()
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    found = []
    for test in (None, loader):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        fit(Backprop(model, nn.MSELoss(), ADAM), loader, test=test, epochs=2)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    model = nn.Linear(6, 1)
    before = torch.get_rng_state()
    evaluate(model, loader, nn.MSELoss())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(own: bool) -> None:
    def loader() -> DataLoader[Any]:
        x, y = rows()
        generator = torch.Generator() if own else None
        return DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, generator=generator)

    def rule() -> Backprop:
        torch.manual_seed(3)
        return Backprop(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)), nn.MSELoss(), ADAM)

    whole = rule()
    fit(whole, loader(), epochs=2)
    states: list[Any] = []
    calls = iter(range(100))
    part = rule()
    with pytest.raises(KeyboardInterrupt):
        fit(
            part,
            loader(),
            epochs=2,
            save=lambda state: states.append({**state, "model": {k: v.clone() for k, v in state["model"].items()}}),
            interrupted=lambda: next(calls) == 12,
        )
    resumed = rule()
    torch.manual_seed(99)
    fit(resumed, loader(), epochs=2, resume=states[-1])
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_alignment_on_a_loader_and_early_stop_without_rows() -> None:
    x, y = rows()
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    history = fit(Backprop(mlp(6, 8, 1), nn.MSELoss(), ADAM), loader, epochs=1, alignment=True)
    assert all(
        stage["cosine"] > 0.999
        for row in history.rows
        if row["kind"] == "alignment"
        for stage in row["stages"].values()
    )
    with pytest.raises(ValueError, match="early_stop needs rows to evaluate on"):
        fit(Backprop(mlp(6, 8, 1), nn.MSELoss(), ADAM), loader, epochs=1, early_stop=2)


def test_an_epoch_of_fresh_sequences_follows_from_the_seed_however_it_is_reached() -> None:
    straight = [x for epoch in range(3) for x, _ in AddingTask(8).batches(epoch, 1600, 4)]
    walked = AddingTask(8)
    again = [x for epoch in range(3) for x, _ in walked.batches(epoch, 1600, 4)]
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
    assert torch.equal(next(iter(walked.batches(2, 1600, 4, 1)))[0], straight[9])
    assert torch.equal(next(iter(walked.batches(0, 1600, 4)))[0], straight[0])


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 'autoencoder:mnist' names its own data; leave out data='higgs'"):
        Settings(task="autoencoder:mnist", data="higgs")
    nets = {"a:b": nn.Linear(10, 1), "a/b": nn.Linear(10, 1)}
    settings = Settings(data="diabetes", nets=tuple(nets), rules=("adam",), seeds=(0,), epochs=1)
    with pytest.raises(
        ValueError, match="nets must have names that differ in a file's name, too; adam a:b, adam a/b do not"
    ):
        compare(settings, nets=nets, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", ["100001", "100000000000", "9" * 5000, "1", "0", "-3", "x"])
def test_the_adding_problem_is_bounded_before_it_is_made(length: str) -> None:
    with pytest.raises(
        ValueError, match=r"adding:LENGTH takes a whole number of steps from 2 to 100,000, .*got '"
    ) as said:
        tasks.load(f"adding:{length}")
    assert len(str(said.value)) < 200
    with pytest.raises(ValueError, match=r"length must be at most 100,000, got 1e\+11"):
        AddingTask(10**11)
