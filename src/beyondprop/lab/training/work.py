"""How much work a step of a rule is, in gradient-equivalents."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from beyondprop.errors import NonFiniteError
from beyondprop.rules import Backprop, LearningRule

_aten = torch.ops.aten


def work_per_step(
    rule: LearningRule, x: Tensor, y: Tensor, *, steps: int = 10, look: Callable[[LearningRule], None] | None = None
) -> float:
    """Return the floating-point operations of the rule's step over those of a step of plain backpropagation.

    Products of matrices, convolutions and factorisations are counted, elementwise operations are not: they are what both
    sides spend little on. Copies of the rule and its model do the steps; the rule itself, its random numbers and the
    global random state stay as they are.

    Args:
        rule: any learning rule.
        x: inputs of one batch `(N, ...)`.
        y: its targets.
        steps: consecutive steps of the rule that are averaged, so that work done every few steps is in.
        look: called with the copy that did them.

    Returns:
        The ratio; nan where it cannot be known: a first step that fails, or a model without products.

    Raises:
        ValueError: if an optimizer cannot be copied; the message names it.
    """
    twin = copied(rule)
    baseline = Backprop(copy.deepcopy(rule.model), rule.loss.loss, partial(torch.optim.SGD, lr=0.0))
    devices = [y.device] if y.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, _ = _count(baseline, x, y, 1)
        try:
            total, done = _count(twin, x, y, steps)
        except Exception:
            copied(twin)  # is it its state?
            raise
        if look is not None:
            look(twin)
    return total / done / plain if done and plain else math.nan


def copied(rule: LearningRule) -> LearningRule:
    """Return a copy of a rule with its model, or raise `ValueError` naming the optimizer that cannot be copied."""
    try:
        return copy.deepcopy(rule)
    except Exception as error:
        for optimizer in rule.optimizers:
            try:
                copy.deepcopy(optimizer)
                copy.deepcopy(vars(optimizer))
            except Exception as own:
                raise ValueError(
                    f"{type(optimizer).__name__} cannot be copied ({type(own).__name__}: {own}), as measurements on the side "
                    "and a step that is taken back need; give it a __deepcopy__, or keep what cannot be copied out of it."
                ) from error
        raise


def is_plain(rule: LearningRule) -> bool:
    """Whether a rule's step is what work is counted in: backpropagation, and an optimizer without products of its own."""
    return (
        type(rule) is Backprop
        and rule.preconditioner is None
        and all(type(optimizer).__module__.startswith("torch.") for optimizer in rule.optimizers)
    )


def _count(rule: LearningRule, x: Tensor, y: Tensor, steps: int) -> tuple[int, int]:
    done = total = 0
    for _ in range(steps):
        counter = _Counter()
        try:
            with counter:
                rule.begin_epoch([(x, y)])  # an epoch's batches, one by one
                rule.step(x, y)
        except (NonFiniteError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            break  # the same batch again and again may diverge where training does not
        total += counter.total
        done += 1
    return total, done


class _Counter(TorchDispatchMode):
    """Adds up operations by torch's own formulas.

    `torch.utils.flop_counter.FlopCounterMode` also tracks modules, with hooks that forbid `torch.autograd.grad` at a stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _MORE:
            self.total += _MORE[packet](*(a.shape if isinstance(a, Tensor) else a for a in args))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


# What torch's table lacks, by the shapes of the operands; two operations for a multiplication with its addition, as there.
# Without addmv_, by which stages sum rows for a bias: sums are not counted.
_MORE: dict[Any, Callable[..., int]] = {
    _aten.addmm_: lambda _, a, b, *_rest: 2 * math.prod(a) * b[-1],
    _aten.baddbmm_: lambda _, a, b, *_rest: 2 * math.prod(a) * b[-1],
    _aten.mv: lambda a, _v: 2 * math.prod(a),
    _aten.addmv: lambda _, a, *_rest: 2 * math.prod(a),
    _aten.linalg_cholesky_ex: lambda a, *_rest: math.prod(a) * a[-1] // 3,
    _aten.cholesky_inverse: lambda a, *_rest: 2 * math.prod(a) * a[-1] // 3,
    _aten.cholesky_solve: lambda b, a, *_rest: 2 * math.prod(b) * a[-1],
    _aten._linalg_solve_ex: lambda a, b, *_rest: 2 * math.prod(a) * a[-1] // 3 + 2 * math.prod(b) * a[-1],
    _aten.linalg_inv_ex: lambda a, *_rest: 2 * math.prod(a) * a[-1],
    _aten.linalg_solve_triangular: lambda a, b, *_rest: math.prod(b) * a[-1],
}
