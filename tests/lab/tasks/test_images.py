"""Augmented images: what is drawn, that nobody draws otherwise, and that training goes on in mid-epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beyondprop import BCD, Backprop, data, fit
from beyondprop.data import Dataset
from beyondprop.lab import tasks
from beyondprop.lab.comparing.comparison import compare
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.runs.checkpoint import load_checkpoint, save_checkpoint
from beyondprop.lab.runs.recorded import read_run
from beyondprop.lab.tasks.images import AugmentedTask, augmented
from beyondprop.lab.tasks.rows import shuffled


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _toy(standardize: bool = True) -> Dataset:
    x = torch.rand(70, 3, 8, 6, generator=_generator())
    y = torch.arange(70) % 4
    if standardize:
        x = (x - 0.5) / 0.3
    return Dataset("cifar10", x[:50], y[:50], x[50:], y[50:], tuple("abcd"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda name, progress=None, standardize=True: _toy(standardize))


# One batch


def _all_crops(image: Tensor, padding: int) -> list[Tensor]:
    height, width = image.shape[1:]
    framed = torch.zeros(image.shape[0], height + 2 * padding, width + 2 * padding)
    framed[:, padding : padding + height, padding : padding + width] = image
    places = itertools.product(range(2 * padding + 1), repeat=2)
    return [framed[:, i : i + height, j : j + width] for i, j in places]


@pytest.mark.parametrize("flips", [False, True])
def test_every_image_is_one_of_its_crops_and_all_are_drawn_alike(flips: bool) -> None:
    image = torch.rand(2, 4, 3, generator=_generator(1))
    crops = _all_crops(image, 2)
    crops += [crop.flip(2) for crop in crops] if flips else []
    found = augmented(image.expand(5000, -1, -1, -1), 2, flips=flips, generator=_generator())
    counts = torch.stack([(found == crop).flatten(1).all(1).sum() for crop in crops])
    assert int(counts.sum()) == 5000
    expected = 5000 / len(crops)
    assert float(((counts - expected) ** 2 / expected).sum()) < 2 * len(
        crops
    )  # chi squared, about as many as there are


def test_images_of_a_batch_draw_for_themselves_and_keep_their_channels_together() -> None:
    x = torch.arange(6 * 5 * 5.0).reshape(6, 1, 5, 5).repeat(1, 3, 1, 1)
    found = augmented(x, 1, flips=True, generator=_generator())
    assert torch.equal(found[:, 0], found[:, 2])
    assert len({tuple((row[0] - base[0]).flatten().tolist()) for row, base in zip(found, x, strict=True)}) > 3


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    x = torch.rand(3, 2, 4, 4)
    assert torch.equal(augmented(x, generator=_generator()), x)
    assert augmented(x, 1, flips=True, generator=_generator()).dtype == x.dtype


def test_what_cannot_be_cropped_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\) are needed, got shape \(3, 4\)"):
        augmented(torch.zeros(3, 4), 1, generator=_generator())
    with pytest.raises(ValueError, match="padding must be an integer >= 0, got -1"):
        augmented(torch.zeros(3, 1, 4, 4), -1, generator=_generator())


# The task


def test_pixels_are_centered_by_the_mean_image_of_the_training_rows(small: None) -> None:
    task, raw = tasks.load("images:cifar10:centered"), _toy(standardize=False)
    mean = 255 * raw.x_train.mean(0)
    torch.testing.assert_close(task.x_train, 255 * raw.x_train - mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(task.x_test, 255 * raw.x_test - mean, rtol=0, atol=1e-4)  # type: ignore[attr-defined]
    assert not hasattr(task, "batches")
    assert torch.equal(tasks.load("images:cifar10").x_train, _toy().x_train)


def test_an_augmented_task_has_the_rows_of_the_plain_one(small: None) -> None:
    task: Any = tasks.load("images:cifar10:pad=1:flip")
    assert isinstance(task, AugmentedTask)
    assert (task.name, task.padding, task.flips, task.sample) == ("images:cifar10:pad=1:flip", 1, True, "image")
    plain: Any = tasks.load("images:cifar10")
    pairs = zip(task.batches(2, 8, 5), shuffled(plain.x_train, plain.y_train, 2, 8, 5), strict=True)
    for number, ((x, y), (base, labels)) in enumerate(pairs):
        assert torch.equal(y, labels)
        assert not torch.equal(x, base)
        assert all(
            any(torch.equal(row, c) or torch.equal(row, c.flip(2)) for c in _all_crops(image, 1))
            for row, image in zip(x, base, strict=True)
        )
        again = next(iter(task.batches(2, 8, 5, number)))[0]
        assert torch.equal(x, again)  # whatever was drawn before
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    assert task.evaluate(model) == plain.evaluate(model)
    held: Any = task.held_out(0.2)
    assert (type(held), held.padding, held.flips, len(held.x_train)) == (AugmentedTask, 1, True, 40)


def test_draws_differ_between_seeds_epochs_and_batches(small: None) -> None:
    task: Any = tasks.load("images:cifar10:pad=3")
    x, y = task.x_train[:1].repeat(32, 1, 1, 1), task.y_train[:32]
    one = AugmentedTask(name="one", kind=task.kind, x_train=x, y_train=y, padding=3)
    found = [x for epoch, seed in ((0, 0), (1, 0), (0, 1)) for x, _ in one.batches(epoch, 16, seed)]
    assert len(found) == 6
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("images:cifar11", r"data must be one of .*'cifar10', got 'cifar11'; perhaps you meant 'cifar10'"),
        ("images:cifar10:pad", "pad=N takes a whole number of pixels up to 1000, got ''"),
        ("images:cifar10:pad=-1", "pad=N takes a whole number"),
        ("images:cifar10:pad=9999", "pad=N takes a whole number"),
        ("images:cifar10:pad=\u0663", "pad=N takes a whole number"),
        ("images:cifar10:flip=yes", "flip takes no value, got 'yes'"),
        ("images:cifar10:centered=", "centered takes no value"),
        ("images:cifar10:flip:flip", "every option goes once, got 'flip:flip'"),
        ("images:cifar10:centred", "option of task images must be one of .*perhaps you meant 'centered'"),
    ],
)
def test_what_is_no_image_task_is_refused(form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.load(form)


@pytest.mark.parametrize("name", ["diabetes", "rows"])
def test_rows_without_images_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset("rows", torch.zeros(4, 3), torch.arange(4) % 2, classes=("a", "b"))
    if name == "rows":
        monkeypatch.setattr(data, "load", lambda *_, **__: rows)
        name = "digits"
    with pytest.raises(ValueError, match="takes images with labels"):
        tasks.load(f"images:{name}")


# In training


def _build() -> Backprop:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96, 4)
    )
    return Backprop(model, nn.CrossEntropyLoss(), torch.optim.Adam)


def test_training_goes_on_in_mid_epoch_with_what_it_would_have_drawn(small: None, tmp_path: Path) -> None:
    task = tasks.load("images:cifar10:centered:pad=2:flip")
    call: dict[str, Any] = {"epochs": 3, "batch_size": 8, "seed": 2, "schedule": "tenth:0.5,0.75"}
    whole = _build()
    rows = fit(whole, task, **call).rows
    for stop in (1, 10, 17):
        steps, rule = iter(range(1, 100)), _build()
        file = tmp_path / f"{stop}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            fit(
                rule,
                task,
                **call,
                save=lambda s, file=file: save_checkpoint(file, s),
                interrupted=lambda steps=steps, stop=stop: next(steps) == stop,
            )
        again = _build()
        torch.manual_seed(99)
        rest = fit(again, task, **call, resume=load_checkpoint(file)).rows
        pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        clean = [[{k: v for k, v in row.items() if k != "seconds"} for row in part] for part in (rest, rows)]
        assert clean[0] == clean[1][-len(rest) :]


def test_every_net_and_rule_sees_the_same_images(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    original = AugmentedTask.batches

    def batches(self: AugmentedTask, *args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in original(self, *args):
            seen[-1].append(x.clone())
            yield x, y

    monkeypatch.setattr(AugmentedTask, "batches", batches)
    task = tasks.load("images:cifar10:pad=2:flip")
    for rule in (
        _build(),
        Backprop(nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), nn.CrossEntropyLoss(), torch.optim.SGD),
    ):
        seen.append([])
        fit(rule, task, epochs=2, batch_size=8, seed=1)
    assert len(seen[0]) == len(seen[1]) > 14
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    monkeypatch.undo()
    monkeypatch.setattr(data, "load", lambda name, progress=None, standardize=True: _toy(standardize))
    settings = Settings(
        task="images:cifar10:pad=2:flip",
        nets=("conv:4x1:bn",),
        rules=("adam", "am-adam"),
        epochs=1,
        batch_size=10,
        seeds=(0,),
        alignment=False,
    )
    run = read_run(compare(settings, out=tmp_path / "run"))
    assert run.config["name"] == "images:cifar10:pad=2:flip"
    assert all(run.of("eval", rule, 0)[-1]["step"] == 5 for rule in settings.rules)


def test_rules_that_take_the_whole_set_are_refused(small: None) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 4))
    rule = BCD(model, nn.CrossEntropyLoss(), output_loss="squared")
    with pytest.raises(ValueError, match=r"images:cifar10:flip shows its rows in batches of its own"):
        fit(rule, tasks.load("images:cifar10:flip"), epochs=1)
