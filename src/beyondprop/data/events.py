"""Recordings of event cameras as spikes: from arrays of events, as Tonic has them, to `(N, T, polarities, height, width)`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beyondprop import _checks
from beyondprop.data._dataset import Dataset

Array = NDArray[Any]

FIELDS = ("x", "y", "t", "p")


class Recordings(Protocol):
    """Pairs of events and labels, such as a data set of Tonic, whose `sensor_size` says width, height and polarities."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Array, Any]: ...


def event_frames(events: Array, sensor_size: Sequence[int], *, steps: int, duration: float) -> Tensor:
    """Return the frames `(T, polarities, height, width)` of a recording, 1 where an event fell into a step, else 0, in float32.

    Args:
        events: structured, with the fields x, y, t (microseconds from the beginning) and p (0 or 1, False or True), in any
            order.
        sensor_size: width, height, polarities; one polarity takes events of both together.
        steps: T.
        duration: microseconds of all steps together; what comes later is left out.

    Raises:
        ValueError: if a field is missing, or an event lies outside of the sensor, or before the beginning.
    """
    width, height, polarities = _size(sensor_size)
    _checks.at_least("steps", steps, 1)
    _checks.positive("duration", duration)
    fields = getattr(getattr(events, "dtype", None), "names", None) or ()
    if missing := [name for name in FIELDS if name not in fields]:
        raise ValueError(
            f"events must be a structured array with the fields {', '.join(FIELDS)}, got "
            f"{', '.join(fields) or type(events).__name__}; missing: {', '.join(missing)}."
        )
    x, y, t, p = (np.asarray(events[name]).astype(np.float64) for name in FIELDS)
    for name, values, most in (
        ("x", x, width - 1),
        ("y", y, height - 1),
        ("t", t, np.finfo(np.float64).max),
        ("p", p, 1),
    ):
        wrong = ~((values >= 0) & (values <= most)) | ((values != np.floor(values)) & (name != "t"))
        if wrong.any():
            accepted = "a number of microseconds >= 0" if name == "t" else f"a whole number in [0, {most:g}]"
            raise ValueError(
                f"{name} of an event must be {accepted} for a sensor of {width} x {height} x {polarities}, got "
                f"{values[wrong][0]:g} in event {int(np.argmax(wrong))}."
            )
    kept = t < duration
    when = np.minimum(np.floor(t[kept] * steps / duration), steps - 1)
    found = torch.zeros(steps, polarities, height, width)
    place = (when, (p if polarities == 2 else 0 * p)[kept], y[kept], x[kept])
    found.index_put_(tuple(torch.from_numpy(one.astype(np.int64)) for one in place), torch.ones(()))
    return found


def from_events(
    train: Recordings,
    test: Recordings | None = None,
    *,
    steps: int = 50,
    duration: float | None = None,
    sensor_size: Sequence[int] | None = None,
    name: str = "events",
) -> Dataset:
    """Make a data set of spikes `(N, T, polarities, height, width)` of recordings, such as the data sets of Tonic.

    Args:
        train: pairs of events (see `event_frames`) and labels, whole numbers or text.
        test: the same, for the test; None: no test rows.
        steps: T.
        duration: microseconds that the steps cover; None: as long as the longest recording of `train`.
        sensor_size: width, height, polarities; None: `train.sensor_size`.
        name: of the data set.

    Raises:
        ValueError: if there is no recording, or no sensor size, or a recording is none; the message says which.
    """
    for part, one in (("train", train), ("test", test)):
        if one is not None and not len(one):
            raise ValueError(f"{part} has no recording.")
    size = sensor_size if sensor_size is not None else getattr(train, "sensor_size", None)
    if size is None:
        raise ValueError(
            "sensor_size must be given, (width, height, polarities): these recordings have none of their own."
        )
    parts = {"train": train} if test is None else {"train": train, "test": test}
    labels: dict[str, list[int | str]] = {part: [] for part in parts}
    longest = 0.0
    for part, one in parts.items():
        for i in range(len(one)):  # each is read here and once more below: all of them may not fit into memory
            events, label = one[i]
            labels[part].append(_label(label))
            if duration is None and part == "train":
                longest = max(longest, _last(events, i))
    classes = sorted(set(labels["train"]), key=lambda label: (isinstance(label, str), label))
    if len(set(map(str, classes))) < len(classes):
        raise ValueError(f"Labels must be told apart by their text, got {classes}.")
    numbers = {label: index for index, label in enumerate(classes)}
    if strange := [label for label in labels.get("test", ()) if label not in numbers]:
        raise ValueError(f"test has a label that train has not: {strange[0]!r}.")
    duration = longest + 1.0 if duration is None else duration
    tensors: list[Tensor] = []
    for part, one in parts.items():
        width, height, polarities = _size(size)
        x = torch.zeros(len(one), steps, polarities, height, width)
        for i in range(len(one)):
            try:
                x[i] = event_frames(one[i][0], size, steps=steps, duration=duration)
            except ValueError as error:
                raise ValueError(f"recording {i} of {part}: {error}") from error
        tensors += [x, torch.tensor([numbers[label] for label in labels[part]])]
    return Dataset(name, *tensors, classes=tuple(map(str, classes)))


def _size(sensor_size: Sequence[int]) -> tuple[int, int, int]:
    size = tuple(sensor_size)
    if len(size) != 3 or not all(isinstance(n, int | np.integer) and n >= 1 for n in size) or size[2] > 2:
        raise ValueError(f"sensor_size must be (width, height, polarities), the last 1 or 2, got {sensor_size!r}.")
    return int(size[0]), int(size[1]), int(size[2])


def _label(label: Any) -> int | str:
    if isinstance(label, str):
        return label
    try:
        return operator.index(label)
    except TypeError:
        raise ValueError(f"A label must be a whole number or text, got {label!r}.") from None


def _last(events: Any, index: int) -> float:
    try:
        times = np.asarray(events["t"])
    except (TypeError, ValueError, IndexError, KeyError):
        raise ValueError(f"recording {index} of train: events must be a structured array with a field t.") from None
    return float(times.max()) if times.size else 0.0


class Packed:
    """The recordings of the small copy of N-MNIST: x, y, packed polarities, and times since the event before.

    Args:
        arrays: of its file.
        rows: which recordings.
    """

    sensor_size = (34, 34, 2)
    _kind = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.int8)])

    def __init__(self, arrays: dict[str, Array], rows: range) -> None:
        self.arrays, self.rows = arrays, rows
        self.polarities = np.unpackbits(arrays["p"], count=len(arrays["x"]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> tuple[Array, Any]:
        row = self.rows[index]
        where = slice(int(self.arrays["offsets"][row]), int(self.arrays["offsets"][row + 1]))
        events = np.empty(where.stop - where.start, dtype=self._kind)
        events["x"], events["y"], events["p"] = self.arrays["x"][where], self.arrays["y"][where], self.polarities[where]
        events["t"] = np.cumsum(self.arrays["dt"][where].astype(np.int64))
        return events, int(self.arrays["labels"][row])
