"""The real files, where `$BEYONDPROP_DATA` has them: their published histograms, moments and first labels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from beyondprop.data import Dataset, _images, describe, load
from beyondprop.errors import DataUnavailableError

pytestmark = pytest.mark.data


def _at_hand(name: str, *, standardize: bool = True) -> Dataset:
    root = os.environ.get("BEYONDPROP_DATA")
    if not root:
        pytest.skip("BEYONDPROP_DATA is not set: it must name a folder with the real data sets")
    try:
        data = load(name, root=root, download=False, standardize=standardize)
    except DataUnavailableError as error:
        pytest.skip(str(error))
    info = describe(name)
    assert (len(data.y_train), len(data.y_test)) == (info.train_size, info.test_size)
    assert data.x_train.shape == (info.train_size, *info.input_shape)
    assert data.x_test.shape == (info.test_size, *info.input_shape)
    assert data.x_train.dtype == torch.float32
    assert data.x_train.is_contiguous()
    assert data.classes == info.classes
    return data


def _load(name: str) -> Dataset:
    data = _at_hand(name)
    # Standardized by the training part's own moments, which are published to four digits or more.
    assert data.x_train.mean((0, 2, 3)).abs().max() < 3e-4
    assert (data.x_train.std((0, 2, 3)) - 1).abs().max() < 3e-4
    return data


def test_higgs() -> None:
    data, raw = _at_hand("higgs"), _at_hand("higgs", standardize=False)
    assert data.classes[1] == "signal"
    assert abs(float(torch.cat([data.y_train, data.y_test]).double().mean()) - 0.530) < 1e-3
    assert data.x_train.mean(0).abs().max() < 1e-4
    assert (data.x_train.std(0) - 1).abs().max() < 1e-4
    assert raw.x_train[:, 0].min() > 0  # the lepton's transverse momentum
    torch.testing.assert_close((raw.x_test - raw.x_train.mean(0)) / raw.x_train.std(0), data.x_test)


def test_higgs_is_tested_on_rows_that_are_not_trained_on() -> None:
    """A published loader tests on the first rows of the training file."""
    data = _at_hand("higgs", standardize=False)
    seen = {row.numpy().tobytes() for row in data.x_train}
    assert sum(row.numpy().tobytes() in seen for row in data.x_test) == 0


def test_mnist() -> None:
    data = _load("mnist")
    assert data.y_train.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.y_test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    torch.testing.assert_close(data.x_train.min(), torch.tensor(-0.1307 / 0.3081))


def test_fashion_mnist() -> None:
    data = _load("fashion-mnist")
    assert data.y_train.bincount().tolist() == [6000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    assert data.classes[data.y_train[0]] == "ankle boot"
    torch.testing.assert_close(data.x_train.min(), torch.tensor(-0.2860 / 0.3530))


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = _load("cifar10")
    assert data.y_train.bincount().tolist() == [5000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    assert data.y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.y_test[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    cached = list(tmp_path.rglob("*.npy"))
    if cached:  # the layout of strips: the second time nothing is decoded
        monkeypatch.delattr(_images, "decode_strips")
        assert torch.equal(load("cifar10", root=os.environ["BEYONDPROP_DATA"], download=False).x_test, data.x_test)
        for path in cached:
            path.unlink()  # pytest keeps its folders, and these are large
