"""Real data sets and one's own: `load("mnist")`, `read_file("wine.csv:target=quality")`, `from_arrays(x, y)`."""

from __future__ import annotations

from beyondprop.data._arrays import from_arrays
from beyondprop.data._catalog import DatasetInfo, at_hand, describe, load, names
from beyondprop.data._dataset import Dataset, batches
from beyondprop.data._files import Progress
from beyondprop.data._tables import is_file_form, read_file
from beyondprop.data.events import event_frames, from_events
from beyondprop.data.sequences import adding
from beyondprop.data.streams import PermutedStream, SplitStream, Stream, StreamTask

__all__ = [
    "Dataset",
    "DatasetInfo",
    "PermutedStream",
    "Progress",
    "SplitStream",
    "Stream",
    "StreamTask",
    "adding",
    "at_hand",
    "batches",
    "describe",
    "event_frames",
    "from_arrays",
    "from_events",
    "is_file_form",
    "load",
    "names",
    "read_file",
]
