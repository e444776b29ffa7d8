"""Layers with a backward of their own; any optimizer and any rule trains them."""

from __future__ import annotations

from beyondprop.nn.binary import Sign

__all__ = ["Sign"]
