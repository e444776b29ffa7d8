"""How well reversible chains reconstruct, and what that does to gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.reversible.chain import ReversibleSequential
from beyondprop.nn.reversible.function import as_made
from beyondprop.nn.reversible.passes import relative_error
from beyondprop.nn.reversible.replay import Random
from beyondprop.nn.reversible.unwinding import streams_before


def reconstruction_error(model: nn.Module, x: Any, *args: Any, **kwargs: Any) -> float:
    """Return the largest relative error with which the chains of a model reconstruct their inputs, on one batch.

    Nothing is trained, and running statistics and random number generators stay as they are.

    Args:
        model: a `ReversibleSequential`, or a module with some inside.
        x: what the model takes.
        args: further arguments of the model.
        kwargs: the same.

    Returns:
        The norm of the difference over that of the input; 0.0: exact to the last bit.

    Raises:
        UnsupportedModelError: if there is no chain in the model.
    """
    errors: list[float] = []

    def compare(chain: ReversibleSequential, given: Any, named: Any, y: Any) -> None:
        named = dict(named)
        start, *rest = given or (named.pop("x"),)
        way = chain.passed(start, (), {})
        streams = streams_before(chain.pass_behind(y, tuple(rest), named), as_made(y))
        errors.append(relative_error(streams, way.start(start)))

    with contextlib.ExitStack() as stack:
        for chain in _chains(model):
            hook = chain.register_forward_hook(compare, with_kwargs=True)  # type: ignore[arg-type]
            stack.callback(hook.remove)
        stack.enter_context(_unchanged(model, _parts(x)[0].device))
        stack.enter_context(_in_mode(model, "inverse"))
        stack.enter_context(torch.enable_grad())
        model(x, *args, **kwargs)
    return max(errors)


def gradient_angle(model: nn.Module, loss_fn: Callable[[Any], Tensor], x: Any, *args: Any, **kwargs: Any) -> float:
    """Return the angle between a model's gradient with reconstructed activations and that with stored ones, in degrees.

    Nothing is trained, and running statistics, `.grad` and random number generators stay as they are.

    Args:
        model: a `ReversibleSequential`, or a module with some inside.
        loss_fn: maps the model's output to a scalar.
        x: what the model takes.
        args: further arguments of the model.
        kwargs: the same.

    Returns:
        0 to 180; nan where one of the gradients is not finite.

    Raises:
        UnsupportedModelError: if there is no chain in the model, or its loss depends on no weight.

    Source: Gomez et al., arXiv 1707.04585, figure 3.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise UnsupportedModelError("The model has no parameter that requires a gradient.")
    found = []
    for mode in ("inverse", "store"):
        device = _parts(x)[0].device
        with _unchanged(model, device), _in_mode(model, mode), torch.enable_grad():
            gradients = torch.autograd.grad(loss_fn(model(x, *args, **kwargs)), weights, allow_unused=True)
        found.append(torch.cat([g.double().flatten() for g in gradients if g is not None]))
    a, b = (g / g.norm() for g in found)
    # atan2 sees small angles, which acos loses to rounding.
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))


def _chains(model: nn.Module) -> list[ReversibleSequential]:
    chains = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    if not chains:
        raise UnsupportedModelError(f"{type(model).__name__} has no ReversibleSequential inside.")
    return chains


def _parts(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [*x]


@contextlib.contextmanager
def _in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    chains = _chains(model)
    before = [chain.mode for chain in chains]
    try:
        for chain in chains:
            chain.mode = mode
        yield
    finally:
        for chain, was in zip(chains, before, strict=True):
            chain.mode = was


@contextlib.contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the model work on copies of its buffers for a while, and leave generators and counters as they are."""
    slots = [(m._buffers, key, b) for m in model.modules() for key, b in m._buffers.items() if b is not None]
    counted = [(m, dict(m.counters)) for m in _chains(model)]
    copies = {id(buffer): buffer.clone() for _, _, buffer in slots}
    with Random([device]).kept():
        try:
            for owner, key, buffer in slots:
                owner[key] = copies[id(buffer)]
            yield
        finally:
            for owner, key, buffer in slots:
                owner[key] = buffer
            for chain, counters in counted:
                chain.counters.update(counters)
