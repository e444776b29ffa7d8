"""Which method senses a box, along which probes, at how many calls, and why."""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.errors import SensingWarning
from beyondprop.func.sensing import designs, tied
from beyondprop.func.sensing.coloring import Coloring, color_columns
from beyondprop.func.sensing.least_squares import Rows
from beyondprop.func.sensing.patterns import Pattern, Ties
from beyondprop.func.sensing.sparse_rows import default_probes

METHODS = ("auto", "dense", "coloring", "regression", "l1", "robust", "rainbow", "spsa")
_SMALL = 32
_WELL = 30.0


@dataclass(frozen=True)
class Wanted:
    """What is known of a Jacobian, and how it is to be sensed.

    Attributes:
        pattern: what `Pattern` takes, or a `Coloring` of it, which is used then; `"dense"`: nothing is 0; `"discover"`: found
            on the first batch; None: not known.
        structure: `"symmetric"`, or an index tensor `(m, n)`: -1 where an entry is 0, equal numbers where entries are equal.
        method: one of `METHODS`.
        probes: how many; None: what the method needs.
        sparsity: the largest number of nonzeros in a row, where the pattern is not known.
        coloring: the colouring that was given as pattern.
    """

    pattern: Any = None
    structure: Any = None
    method: str = "auto"
    probes: int | None = None
    sparsity: int | None = None
    coloring: Coloring | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _checks.one_of("method", self.method, METHODS)
        if isinstance(self.pattern, Coloring):
            if self.method not in ("auto", "coloring"):
                raise ValueError(f"A Coloring goes with method='coloring', got {self.method!r}; give its pattern.")
            object.__setattr__(self, "coloring", self.pattern)
            object.__setattr__(self, "pattern", self.pattern.pattern)
            object.__setattr__(self, "method", "coloring")
        elif isinstance(self.pattern, str):
            _checks.one_of("pattern", self.pattern, ("dense", "discover"))
        elif self.pattern is not None:
            object.__setattr__(self, "pattern", Pattern(self.pattern))
        for name in ("probes", "sparsity"):
            if hasattr(getattr(self, name), "__index__") and not isinstance(getattr(self, name), bool):
                object.__setattr__(self, name, operator.index(getattr(self, name)))  # NumPy's integers, too
            if (value := getattr(self, name)) is not None:
                _checks.at_least(name, value, 1)
        needs = self.method in ("coloring", "regression", "robust", "rainbow")
        if needs and self.pattern is None and self.structure is None:
            raise ValueError(
                f"method={self.method!r} needs a pattern: which outputs depend on which inputs, 'discover' to find it, or "
                "'dense'."
            )
        if isinstance(self.structure, str):
            _checks.one_of("structure", self.structure, ("symmetric",))
        elif self.structure is not None:
            object.__setattr__(self, "structure", torch.as_tensor(self.structure).detach().cpu())
            if self.structure.ndim != 2:
                raise ValueError(
                    "structure must be 'symmetric' or an index tensor (outputs, inputs), got the shape "
                    f"{tuple(self.structure.shape)}."
                )
        if self.structure is not None and self.method != "auto":
            raise ValueError(f"structure is solved jointly and goes with method='auto', got {self.method!r}.")
        if self.structure is not None and self.pattern == "discover":
            raise ValueError("structure and pattern='discover' do not go together; give the pattern, or leave it out.")
        if self.pattern == "discover" and self.method in ("dense", "spsa"):
            raise ValueError(
                f"method={self.method!r} uses no pattern, and pattern='discover' would pay for one; leave it out."
            )
        if self.pattern == "discover" and self.method == "robust":
            raise ValueError(
                "method='robust' is for calls that may be wrong, from which no pattern can be discovered; give it, or "
                "discover it from others."
            )
        if self.method == "l1" and self.pattern is not None:
            raise ValueError("method='l1' is for a pattern that is not known; leave pattern out, or take 'regression'.")
        if self.method == "l1" and self.sparsity is None and self.probes is None:
            raise ValueError("method='l1' needs sparsity, the largest number of nonzeros in a row, or probes.")


@dataclass
class Plan:
    """How a box is sensed.

    Attributes:
        method: `"dense"`, `"coloring"`, `"regression"`, `"structured"`, `"l1"`, `"robust"`, `"rainbow"` or `"spsa"`.
        probes: how many directions.
        calls: of the box for one sample's Jacobian.
        reason: why this method.
        directions: `(k, n)`; None: drawn anew for every sample.
        pattern, coloring, rows, tied: what the method solves with, where it does.
        sparsity: see `Wanted`.
        shape: outputs and inputs of the box.
    """

    method: str
    probes: int
    calls: int
    reason: str
    directions: Tensor | None = None
    pattern: Pattern | None = None
    coloring: Coloring | None = None
    rows: Rows | None = None
    tied: tied.Tied | None = None
    sparsity: int | None = None
    shape: tuple[int, int] = (0, 0)

    @property
    def condition(self) -> float | None:
        """The worst condition number of a system that is solved."""
        solver = self.rows or self.tied
        return None if solver is None else solver.condition

    @property
    def own(self) -> Tensor | None:
        """The one probe that moves each input, `(n,)`; None: several do."""
        if self.coloring is not None:
            return self.coloring.colors
        return torch.arange(self.probes) if self.method == "dense" else None

    @property
    def scales_are_shared(self) -> bool:
        """Whether the inputs of a sample keep their scales in proportion."""
        return self.tied is not None

    def __repr__(self) -> str:
        return f"Plan({self.method}, {self.probes} probes, {self.calls} calls a sample: {self.reason})"


def plan(
    wanted: Wanted,
    outputs: int,
    inputs: int,
    *,
    sides: int,
    noisy: bool,
    unit: Tensor,
    generator: torch.Generator | None,
) -> Plan:
    """Return how to sense a box with so many outputs and inputs.

    Args:
        wanted: what is known; the pattern is there by now, where it had to be discovered.
        outputs: m.
        inputs: n.
        sides: calls a probe, 1 or 2.
        noisy: whether more than rounding blurs the outputs.
        unit: scale of every input, `(n,)`; probes are in units of it, and tied entries are not.
        generator: for probe directions; None: always the same ones.

    Raises:
        ValueError: if pattern or structure have another shape, or the probes are too few.
    """
    found = _planned(wanted, (outputs, inputs), sides, noisy, unit, generator)
    found.shape = (outputs, inputs)
    return found


def check_shape(given: tuple[int, int], outputs: int, inputs: int) -> None:
    """Raise `ValueError` unless a pattern's shape is that of the box."""
    if given != (outputs, inputs):
        raise ValueError(f"pattern must have the shape (outputs, inputs) = {(outputs, inputs)}, got {given}.")


def _planned(
    wanted: Wanted, shape: tuple[int, int], sides: int, noisy: bool, unit: Tensor, generator: torch.Generator | None
) -> Plan:
    outputs, inputs = shape
    given = Pattern.dense(outputs, inputs) if wanted.pattern == "dense" else wanted.pattern
    if given is not None:
        check_shape(given.shape, outputs, inputs)
    if wanted.structure is not None:
        return _structured(wanted, given, shape, sides, noisy, unit, generator)
    if given is not None and not given.nnz:
        return Plan("coloring", 0, 0, "no output depends on any input", pattern=given)
    choice, reason = wanted.method, "asked for"
    if choice == "auto":
        choice, reason = _chosen(wanted, given, inputs)
    if choice == "pattern":
        assert given is not None
        return _best_of_pattern(wanted, given, sides, generator)
    build = {"coloring": _coloring, "regression": _regression, "robust": _robust, "rainbow": _rainbow}
    if choice in build:
        assert given is not None
        return build[choice](wanted, given, sides, generator, reason)
    if choice == "l1":
        count = wanted.probes or default_probes(inputs, wanted.sparsity or 1)
        if count > inputs / 2:
            return _dense(wanted, given, inputs, sides, f"{count} probes for l1 are more than half of {inputs} inputs")
        directions = designs.general(count, inputs, generator)
        return Plan("l1", count, sides * count, reason, directions, sparsity=wanted.sparsity)
    if choice == "spsa":
        count = wanted.probes or math.ceil(math.sqrt(inputs))
        return Plan("spsa", count, sides * count, reason)
    return _dense(wanted, given, inputs, sides, reason)


def _chosen(wanted: Wanted, pattern: Pattern | None, inputs: int) -> tuple[str, str]:
    if pattern is not None:
        return "pattern", ""
    if wanted.sparsity is not None:
        return "l1", f"no pattern, and at most {wanted.sparsity} nonzeros a row"
    if inputs <= _SMALL:
        return "dense", f"no pattern, and only {inputs} inputs"
    count = wanted.probes or math.ceil(math.sqrt(inputs))
    warnings.warn(
        f"Nothing is known of the Jacobian of a black box with {inputs} inputs: its gradients are estimated along {count} "
        f"random directions, with an expected relative error of {math.sqrt(inputs / count):.1f}. Give pattern= (which outputs "
        "depend on which inputs), pattern='discover', sparsity= or structure=; method='dense' is exact, method='spsa' asks for "
        "this.",
        SensingWarning,
        stacklevel=2,
    )
    return "spsa", f"nothing is known of {inputs} inputs"


def _dense(wanted: Wanted, pattern: Pattern | None, inputs: int, sides: int, reason: str) -> Plan:
    if wanted.method == "dense" and wanted.probes not in (None, inputs):
        raise ValueError(f"method='dense' takes a probe for each of {inputs} inputs, got probes={wanted.probes}.")
    return Plan("dense", inputs, sides * inputs, reason, torch.eye(inputs, dtype=torch.float64), pattern)


def _best_of_pattern(wanted: Wanted, pattern: Pattern, sides: int, generator: torch.Generator | None) -> Plan:
    widest = pattern.widest
    if pattern.is_dense and wanted.probes in (None, pattern.shape[1]):
        return _dense(wanted, pattern, pattern.shape[1], sides, "every output may depend on every input")
    if wanted.probes is not None:
        reason = f"{wanted.probes} probes asked for, for at most {widest} nonzeros a row"
        return _regression(wanted, pattern, sides, generator, reason)
    found = color_columns(pattern)
    if found.count <= widest + 1:
        return _colored(found, sides, f"{found.count} colours, where regression takes {widest} + 1 probes")
    reason = f"at most {widest} nonzeros a row, where colouring takes {found.count} probes"
    return _regression(wanted, pattern, sides, generator, reason)


def _coloring(wanted: Wanted, pattern: Pattern, sides: int, generator: torch.Generator | None, reason: str) -> Plan:
    found = wanted.coloring or color_columns(pattern)
    if wanted.probes is not None and wanted.probes != found.count:
        raise ValueError(
            f"method='coloring' takes as many probes as there are colours, {found.count}, got {wanted.probes}."
        )
    return _colored(found, sides, reason)


def _colored(found: Coloring, sides: int, reason: str) -> Plan:
    return Plan("coloring", found.count, sides * found.count, reason, found.seeds(), found.pattern, found)


def _regression(wanted: Wanted, pattern: Pattern, sides: int, generator: torch.Generator | None, reason: str) -> Plan:
    inputs, widest = pattern.shape[1], pattern.widest
    count = wanted.probes or min(widest + 1, inputs)
    directions = designs.for_pattern(count, pattern, generator)
    rows = Rows(pattern, directions)
    if wanted.probes is None and rows.condition > _WELL and count < inputs:
        count += 1
        directions = designs.for_pattern(count, pattern, generator)
        rows = Rows(pattern, directions)
    return Plan("regression", count, sides * count, reason, directions, pattern, rows=rows)


def _robust(wanted: Wanted, pattern: Pattern, sides: int, generator: torch.Generator | None, reason: str) -> Plan:
    count = wanted.probes or 6 * pattern.widest + 10
    directions = designs.for_pattern(count, pattern, generator)
    return Plan("robust", count, sides * count, reason, directions, pattern, rows=Rows(pattern, directions))


def _rainbow(wanted: Wanted, pattern: Pattern, sides: int, generator: torch.Generator | None, reason: str) -> Plan:
    overlap = max(1, -(-pattern.widest // 2))
    classes = weak_classes(pattern, overlap)
    each = overlap + 1
    if len(classes) * each > pattern.shape[1]:  # then every column is a class by itself
        classes, each = [torch.tensor([j]) for j in range(pattern.shape[1])], 1
    directions = torch.zeros(len(classes) * each, pattern.shape[1], dtype=torch.float64)
    for index, members in enumerate(classes):
        directions[index * each : (index + 1) * each, members] = designs.general(each, len(members), generator)
    count = len(directions)
    if wanted.probes is not None and wanted.probes != count:
        raise ValueError(
            f"method='rainbow' takes {each} probes for each of {len(classes)} classes, {count}, got {wanted.probes}."
        )
    return Plan("rainbow", count, sides * count, reason, directions, pattern, rows=Rows(pattern, directions))


def weak_classes(pattern: Pattern, overlap: int) -> list[Tensor]:
    """Return the columns in classes of which no row has more than `overlap`: a weak colouring, greedy, widest columns first.

    Source: Choromanski & Sindhwani, NeurIPS 2017.
    """
    rows_of: list[list[int]] = [[] for _ in range(pattern.shape[1])]
    for row, column in zip(pattern.rows.tolist(), pattern.columns.tolist(), strict=True):
        rows_of[column].append(row)
    taken: list[list[int]] = []
    members: list[list[int]] = []
    for column in sorted(range(len(rows_of)), key=lambda j: -len(rows_of[j])):
        fitting = (c for c, used in enumerate(taken) if all(used[row] < overlap for row in rows_of[column]))
        place = next(fitting, len(taken))
        if place == len(taken):
            taken.append([0] * pattern.shape[0])
            members.append([])
        members[place].append(column)
        for row in rows_of[column]:
            taken[place][row] += 1
    return [torch.tensor(sorted(each)) for each in members]


def _structured(
    wanted: Wanted,
    pattern: Pattern | None,
    shape: tuple[int, int],
    sides: int,
    noisy: bool,
    unit: Tensor,
    generator: torch.Generator | None,
) -> Plan:
    ties = Ties(wanted.structure, pattern, shape)
    found = tied.design(ties, wanted.probes, unit, generator, more=2 if noisy else 0)
    count = len(found.probes)
    reason = f"{ties.count} unknowns for {ties.pattern.nnz} nonzeros"
    return Plan("structured", count, sides * count, reason, found.probes / unit, ties.pattern, tied=found)
