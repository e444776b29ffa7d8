"""A function that autograd cannot see, as a layer."""

from beyondprop.nn.blackbox.layer import BlackBox

__all__ = ["BlackBox"]
