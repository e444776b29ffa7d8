"""Rules that keep auxiliary variables for a whole data set: one step is one sweep over all its rows."""

from __future__ import annotations

from beyondprop.rules.offline.admm import ADMM
from beyondprop.rules.offline.altmin import OfflineAltMin
from beyondprop.rules.offline.base import OfflineRule, OfflineState
from beyondprop.rules.offline.bcd import BCD
from beyondprop.rules.offline.mac import MAC

__all__ = ["ADMM", "BCD", "MAC", "OfflineAltMin", "OfflineRule", "OfflineState"]
