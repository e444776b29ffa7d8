"""Training image by image with the published settings: what it goes on from, whom it weighs, how images are distorted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from beyondprop import data
from beyondprop.data import Dataset
from beyondprop.lab.recipes import _published_spiking, spiking_cnn_published, spiking_mnist_published
from beyondprop.lab.recipes._base import Context
from beyondprop.lab.recipes._published_spiking import Published, layer, train
from beyondprop.lab.runs.checkpoint import load_checkpoint


def _tiny() -> nn.Sequential:
    hidden = layer(nn.Linear(16, 6, bias=False), 1.0, 1.0)
    return nn.Sequential(nn.Flatten(2), hidden, layer(nn.Linear(6, 3, bias=False), 2.0, 1.0, is_last=True))


TINY = Published(_tiny, sharpness=0.04, decay=lambda epoch: max(1, epoch) ** 0.5)
DISTORTED = Published(_tiny, sharpness=None, decay=lambda epoch: 1.0, distort=spiking_cnn_published.distorted)


@pytest.fixture(autouse=True)
def blobs(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 1, 4, 4, generator=g), torch.arange(16) % 3
    found = Dataset("mnist", x[:12], y[:12], x[12:], y[12:], ("a", "b", "c"))
    monkeypatch.setattr(data, "load", lambda *_, **__: found)
    monkeypatch.setattr(_published_spiking, "STEPS", 120)
    monkeypatch.setattr(_published_spiking, "CHECKED", 5)
    return found


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "training.safetensors")["net"]


def _stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the training end before an image."""
    learn, calls = _published_spiking._Training._learn, iter(range(10**6))

    def stopping(self: _published_spiking._Training, index: int, epoch: int) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        learn(self, index, epoch)

    monkeypatch.setattr(_published_spiking._Training, "_learn", stopping)


@pytest.mark.parametrize("published", [TINY, DISTORTED], ids=["as-they-are", "distorted"])
@pytest.mark.parametrize("stop", [3, 7, 12, 19])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    published: Published, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(Context(tmp_path / "whole", False, said.append), published, 2, None, 4)
    context = Context(tmp_path / "parts", False, said.append)
    with monkeypatch.context() as patch:
        _stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(context, published, 2, None, 4)
    assert train(context, published, 2, None, 4) == whole
    theirs = _weights(tmp_path / "whole")
    assert all(torch.equal(w, theirs[name]) for name, w in _weights(tmp_path / "parts").items())
    assert len(whole[-1]["train_curve"]) == 6  # of every 5, 5 and 2 of 12 images, twice


def test_more_epochs_go_on_from_fewer(tmp_path: Path) -> None:
    context = Context(tmp_path, False, lambda _: None)
    first = train(context, TINY, 1, None, 4)
    assert train(context, TINY, 2, None, 4)[0] == first[0]
    (tmp_path / "epochs.json").unlink()
    with pytest.raises(ValueError, match="does not lead to epoch 1"):
        train(context, TINY, 1, None, 4)


def test_a_later_epoch_does_not_begin_anew_without_its_checkpoint(tmp_path: Path) -> None:
    context = Context(tmp_path, False, lambda _: None)
    train(context, TINY, 1, None, 4)
    (tmp_path / "training.safetensors").unlink()
    with pytest.raises(ValueError, match="does not lead to epoch 2"):
        train(context, TINY, 2, None, 4)


def test_samples_that_were_wrong_weigh_more_by_how_much_of_their_class_was(tmp_path: Path, blobs: Dataset) -> None:
    context = Context(tmp_path, False, lambda _: None)
    train(context, TINY, 1, None, 4)
    kept = load_checkpoint(tmp_path / "training.safetensors")
    wrong = kept["right"] == 0
    assert 0 < int(wrong.sum()) < len(wrong)
    for label in range(3):
        own = blobs.y_train == label
        share = float(wrong[own].double().mean())
        wanted = torch.where(wrong[own], math.exp(share / 20.0), 1.0).float()
        torch.testing.assert_close(kept["importance"][own], wanted)


def test_distorted_images_stay_near_and_in_range() -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 28, 28)
    image[0, 8:20, 10:18] = 1.0
    found = [spiking_cnn_published.distorted(image, g) for _ in range(20)]
    assert all(one.shape == image.shape and 0 <= float(one.min()) <= float(one.max()) <= 1 for one in found)
    assert len({round(float(one.sum()), 4) for one in found}) == 20
    for one in found:
        mass = one[0] / one.sum()
        rows, columns = (torch.arange(28.0) @ mass.sum(1), torch.arange(28.0) @ mass.sum(0))
        assert abs(float(rows) - 13.5) < 3
        assert abs(float(columns) - 13.5) < 3
        assert 0.6 < float(one.sum() / image.sum()) < 1.6


@pytest.mark.parametrize("recipe", [spiking_mnist_published, spiking_cnn_published])
def test_layers_are_the_published_ones(recipe: object) -> None:
    layers = recipe.build()  # type: ignore[attr-defined]
    x = (torch.rand(1, 8, 1, 28, 28) < 0.2).float()
    spiking = [part for part in layers if isinstance(getattr(part, "op", None), nn.Module)]
    with torch.no_grad():
        for part in layers[:-1]:
            x = part(x)
    assert x.shape[:2] == (1, 8)
    assert layers[-1].injected == 35
    assert {part.neuron.tau_mem for part in spiking} == {64.0}
