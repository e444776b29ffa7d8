"""Derivatives of functions: `sensing`, where autograd cannot see inside."""

from beyondprop.func import sensing

__all__ = ["sensing"]
