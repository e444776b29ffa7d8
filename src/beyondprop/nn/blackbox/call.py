"""One forward pass of a black box, and its backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from beyondprop.func.sensing.batch import Batch, flattened
from beyondprop.func.sensing.linearised import Linearised


class Call:
    """One forward pass of a box, and its backward pass.

    Args:
        box: the layer.
        seed: of a simulator; None: drawn where the box takes one.

    Attributes:
        seed: of the simulator; None: it takes none.
    """

    def __init__(self, box: Any, seed: int | None = None) -> None:
        self.box = box
        if seed is None and box.caller.settings.seed_kwarg is not None:
            seed = int(torch.randint(2**31 - 1, (), generator=box.generator))
        self.seed = seed
        self._start: Tensor | None = None
        self._precision = 0.0
        self._found: Linearised | None = None
        self._batch: Batch | None = None

    def argnums(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """Return which inputs are differentiated."""
        if self.box.argnums is not None:
            return self.box.argnums
        found = tuple(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point())
        return found or (0,)

    def batch(self, inputs: Sequence[Tensor]) -> Batch:
        """Return inputs as rows."""
        if self._batch is None:
            self._batch = Batch(self.box.caller, inputs, self.argnums(inputs), self.seed)
        return self._batch

    def value(self, inputs: Sequence[Tensor], kind: str | None = None) -> list[Tensor]:
        """Return the box's outputs, each `(N, ...)`, as it computes them; calls count by the layer's mode, or as `kind`."""
        if not inputs:
            raise TypeError("The black box got no input; it takes one tensor (N, ...) or more.")
        box, batch = self.box, self.batch(inputs)
        box.sensor.check_bounds(batch.x)
        leaves = batch.value(kind or ("forward" if box.training else "evaluation"))
        outputs = batch.outputs
        if box.out_features not in (None, outputs):
            raise ValueError(f"The black box returned {outputs} numbers a row, and out_features={box.out_features}.")
        box._sizes = (outputs, batch.x.shape[1])
        if box.sensor.steps.difference == "forward":
            self._start = flattened(leaves)
        self._precision = batch.precision(leaves)
        return leaves

    def restart(self, inputs: Sequence[Tensor]) -> None:
        """Take up a pass that another call made: forward differences start from its values, which are asked for again."""
        if self.box.sensor.steps.difference == "forward":
            self._start = flattened(self.batch(inputs).value("backward"))

    def linearise(self, inputs: Sequence[Tensor], rows: Tensor | None = None, kind: str = "backward") -> Linearised:
        """Return the Jacobians at the inputs of the pass, or those of some of its rows; once found, those of all are kept.

        Args:
            inputs: of the pass.
            rows: which of them; None: all.
            kind: what the calls are counted as.
        """
        if self._found is not None:
            return self._found if rows is None else self._found.of(rows)
        if self.box.reuse.is_on:
            kept = self.box.reuse.linearise(self.batch(inputs).x, lambda some: self._sensed(inputs, some, kind))
            self._found = kept
            return kept if rows is None else kept.of(rows)
        found = self._sensed(inputs, rows, kind)
        if rows is None:
            self._found = found
        return found

    def _sensed(self, inputs: Sequence[Tensor], rows: Tensor | None, kind: str) -> Linearised:
        batch = self.batch(inputs)
        if rows is not None:
            few = [x[rows.to(x.device)] for x in inputs]
            batch = Batch(self.box.caller, few, batch.argnums, self.seed, rows)
        start = self._start if rows is None or self._start is None else self._start[rows]
        precision = self._precision or batch.precision([batch.x])
        return self.box.sensor.linearise(batch.x, start, precision, batch.outputs, batch.evaluate, kind)

    def pull(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return `J^T v` for every input that is differentiated."""
        v = flattened(cotangents)
        rows = torch.nonzero((v != 0).any(1)).flatten()
        batch = self.batch(inputs)
        if len(rows) == len(v) or self.seed is not None or self._found is not None:  # a seed is that of the whole batch
            found = self.linearise(inputs).pull(v)
        else:
            found = torch.zeros(len(v), batch.x.shape[1], dtype=torch.float64)
            if len(rows):
                found[rows] = self.linearise(inputs, rows).pull(v[rows])
        own = [inputs[i] for i in batch.argnums]
        parts = zip(batch.split(found), own, strict=True)
        return [part.to(x.dtype) for part, x in parts]

    def push(self, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
        """Return `J u` for every output, from a tangent for every input that is differentiated."""
        u = torch.cat([t.detach().reshape(len(t), -1).to("cpu", torch.float64) for t in tangents], 1)
        return self.outputs(self.linearise(inputs).push(u), inputs)

    def outputs(self, flat: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return flat outputs `(N, m)` as those of the layer."""
        shapes = self.box.caller.shapes
        assert shapes is not None
        like = inputs[self.argnums(inputs)[0]]
        parts = flat.split([math.prod(shape) for shape in shapes], 1)
        return [p.reshape(len(p), *shape).to(like.device, like.dtype) for p, shape in zip(parts, shapes, strict=True)]

    def cast(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the box's outputs on the device and in the precision of the layer's input."""
        like = inputs[self.argnums(inputs)[0]]
        return [leaf.to(like.device, like.dtype) for leaf in leaves]
