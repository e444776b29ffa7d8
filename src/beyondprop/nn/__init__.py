"""Layers with a backward of their own, or a code of their own; any optimizer and any rule trains them."""

from __future__ import annotations

from beyondprop.nn.recurrent import ElmanCell, Recurrent

__all__ = ["ElmanCell", "Recurrent"]
