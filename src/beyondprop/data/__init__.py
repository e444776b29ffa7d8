"""Real data sets by name, as tensors: `load("digits")`, `load("mnist")`, ….

Files are looked for in the `root` argument, in `$BEYONDPROP_DATA` and in the user's cache, and are downloaded
from the set's public home otherwise. Every byte that is used is checked against a known SHA-256.
"""

from __future__ import annotations

from beyondprop.data._catalog import DatasetInfo, at_hand, describe, load, names
from beyondprop.data._dataset import Dataset, batches
from beyondprop.data._files import Progress

__all__ = [
    "Dataset",
    "DatasetInfo",
    "Progress",
    "at_hand",
    "batches",
    "describe",
    "load",
    "names",
]
