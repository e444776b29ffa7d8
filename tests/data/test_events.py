"""Recordings of event cameras as spikes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from beyondprop import data

KIND = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])  # the order of fields is any


def _events(*rows: tuple[int, int, int, int]) -> Any:
    return np.array(list(rows), dtype=KIND)


class _Recordings:
    sensor_size = (4, 3, 2)

    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        return _events((index, 1, 0, 1), (3, 2, 90 + index, 0)), self.labels[index]


def test_events_are_spikes_where_and_when_they_happened() -> None:
    events = _events((3, 0, 5, 1), (3, 0, 9, 1), (0, 2, 10, 0), (1, 1, 39, 1), (1, 1, 40, 1))
    found = data.event_frames(events, (4, 3, 2), steps=4, duration=40)
    expected = torch.zeros(4, 2, 3, 4)
    expected[0, 1, 0, 3] = expected[1, 0, 2, 0] = expected[3, 1, 1, 1] = 1.0
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    both = data.event_frames(events[::-1], (4, 3, 1), steps=4, duration=40)
    assert torch.equal(both, expected.amax(1, keepdim=True))
    assert not data.event_frames(events[:0], (4, 3, 2), steps=4, duration=40).any()


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ((4, 0, 0, 0), r"x of an event must be a whole number in \[0, 3\].*got 4 in event 1"),
        ((0, 3, 0, 0), r"y of an event must be a whole number in \[0, 2\]"),
        ((0, 0, -1, 0), "t of an event must be a number of microseconds >= 0"),
    ],
)
def test_events_outside_are_named(event: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        data.event_frames(_events((0, 0, 0, 0), event), (4, 3, 2), steps=2, duration=9)


def test_what_is_no_recording_is_refused() -> None:
    for events in (np.zeros((3, 4)), np.zeros(3, dtype=[("x", int), ("y", int)])):
        with pytest.raises(ValueError, match="fields x, y, t, p"):
            data.event_frames(events, (4, 3, 2), steps=2, duration=9)
    for size in ((4, 3), (4, 3, 3), (4, 0, 2)):
        with pytest.raises(ValueError, match="sensor_size must be"):
            data.event_frames(_events(), size, steps=2, duration=9)
    with pytest.raises(ValueError, match="duration"):
        data.event_frames(_events(), (4, 3, 2), steps=2, duration=0)
    strange = np.array([(0, 0, 0, 2)], dtype=[("x", int), ("y", int), ("t", int), ("p", int)])
    with pytest.raises(ValueError, match=r"p of an event must be a whole number in \[0, 1\]"):
        data.event_frames(strange, (4, 3, 2), steps=2, duration=9)


def test_recordings_are_a_data_set() -> None:
    found = data.from_events(_Recordings([7, 3, 7]), _Recordings([3]), steps=5, name="mine")
    assert found.classes == ("3", "7")
    assert found.y_train.tolist() == [1, 0, 1]
    assert found.y_test.tolist() == [0]
    assert found.x_train.shape == (3, 5, 2, 3, 4)
    # 92 microseconds and one: an event at 92 is in the last step.
    assert found.x_train[2].nonzero().tolist() == [[0, 1, 1, 2], [4, 0, 2, 3]]
    words = data.from_events(_Recordings(["b", "a"]), steps=5, duration=50)
    assert words.classes == ("a", "b")
    assert words.x_train.sum() == 2  # those at 90 are left out
    assert words.x_test is None


def test_recordings_that_are_none_are_refused() -> None:
    class Bare(_Recordings):
        sensor_size = None  # type: ignore[assignment]

    class Late(_Recordings):
        def __getitem__(self, index: int, /) -> tuple[Any, Any]:
            return _events((4 * index, 0, 0, 0)), 1

    with pytest.raises(ValueError, match="no recording"):
        data.from_events(_Recordings([]))
    with pytest.raises(ValueError, match="sensor_size must be given"):
        data.from_events(Bare([1]))
    with pytest.raises(ValueError, match="a label that train has not: 5"):
        data.from_events(_Recordings([1]), _Recordings([5]))
    with pytest.raises(ValueError, match=r"recording 1 of train: x of an event"):
        data.from_events(Late([1, 1]), duration=9)
    with pytest.raises(ValueError, match="A label must be"):
        data.from_events(_Recordings([None]))


@pytest.mark.data
def test_the_small_copy_of_n_mnist_is_as_described() -> None:
    if not data.at_hand("nmnist-small"):
        pytest.skip("needs nmnist-small in BEYONDPROP_DATA")
    found = data.load("nmnist-small")
    assert found.x_train.shape == (1000, 50, 2, 34, 34)
    assert found.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # of the first images of MNIST
    assert found.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert set(found.x_train.unique().tolist()) == {0.0, 1.0}
    spikes = found.x_train.sum((1, 2, 3, 4))
    assert 1000 < float(spikes.min()) < float(spikes.max()) < 7152  # fewer than events, of which some share a step


@pytest.mark.parametrize(
    ("steps", "duration", "t", "step"), [(45, 300000, 20000, 3), (25, 1225, 49, 1), (36, 1000, 750, 27)]
)
def test_an_event_at_the_edge_of_a_step_is_in_it(steps: int, duration: int, t: int, step: int) -> None:
    found = data.event_frames(_events((0, 0, t, 0)), (1, 1, 1), steps=steps, duration=duration)
    assert found.flatten().nonzero().tolist() == [[step]]


def test_numbers_that_are_not_whole_are_not_cut() -> None:
    kind = np.dtype([("x", "f8"), ("y", "f8"), ("t", "f8"), ("p", "f8")])
    for event, said in (
        ((0, 0, 1, -0.5), "p of"),
        ((0, 0, 1, 0.7), "p of"),
        ((0.5, 0, 1, 0), "x of"),
        ((0, 0, np.inf, 0), "t of"),
    ):
        with pytest.raises(ValueError, match=said):
            data.event_frames(np.array([event], dtype=kind), (1, 1, 2), steps=2, duration=9.0)
    assert not data.event_frames(np.array([(0, 0, 9e18, 0)], dtype=kind), (1, 1, 2), steps=2, duration=9.0).any()


def test_labels_are_told_apart() -> None:
    for labels, said in (([0.2, 0.7], "A label must be"), ([1, "1"], "told apart")):
        with pytest.raises(ValueError, match=said):
            data.from_events(_Recordings(labels), steps=2)
    assert data.from_events(_Recordings([np.int64(3), torch.tensor(4)]), steps=2).classes == ("3", "4")
    with pytest.raises(ValueError, match="test has no recording"):
        data.from_events(_Recordings([1]), _Recordings([]))
