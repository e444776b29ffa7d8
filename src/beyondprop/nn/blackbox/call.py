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
        seed: of a simulator; None: where the box takes one, it is drawn from torch's global state with the first call.

    Attributes:
        seed: of the simulator; None: it takes none, or was not called yet.
    """

    def __init__(self, box: Any, seed: int | None = None) -> None:
        self.box = box
        self.seed = seed
        self._start: Tensor | None = None
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
            if self.seed is None and self.box.caller.settings.seed_kwarg is not None:
                # Of the global state, which activation checkpoints put back, and below what functions are transformed to.
                self.seed = int(torch.randint(2**31 - 1, ()))
            self._batch = Batch(self.box.caller, inputs, self.argnums(inputs), self.seed)
        return self._batch

    def value(self, inputs: Sequence[Tensor], kind: str | None = None) -> list[Tensor]:
        """Return the box's outputs, each `(N, ...)`, as it computes them; calls count by the layer's mode, or as `kind`."""
        if not inputs:
            raise TypeError("The black box got no input; it takes one tensor (N, ...) or more.")
        box, batch = self.box, self.batch(inputs)
        box.sensor.check_bounds(batch.x, batch.given[0])
        leaves = batch.value(kind or ("forward" if box.training else "evaluation"))
        outputs = batch.outputs
        if box.out_features not in (None, outputs):
            raise ValueError(f"The black box returned {outputs} numbers a row, and out_features={box.out_features}.")
        box.sizes = (outputs, batch.x.shape[1])
        if box.sensor.steps.difference == "forward":
            self._start = flattened(leaves)
        return leaves

    def restart(self, inputs: Sequence[Tensor]) -> None:
        """Take up a pass that another call made: forward differences start from its values, which are asked for again."""
        if self.box.sensor.steps.difference == "forward" and self._start is None:
            self._start = flattened(self.batch(inputs).value("backward"))

    def linearise(self, inputs: Sequence[Tensor], rows: Tensor | None = None) -> Linearised:
        """Return the Jacobians at the inputs of the pass, or those of some of its rows; once found, those of all are kept."""
        if self._found is None and self.box.reuse.is_on:
            batch = self.batch(inputs)
            fixed = [x for index, x in enumerate(batch.inputs) if index not in batch.argnums]
            self._found = self.box.reuse.linearise(batch.x, fixed, lambda some: self.sensed(inputs, some))
        if self._found is None and rows is None:
            self._found = self.sensed(inputs)
        if self._found is None:
            return self.sensed(inputs, rows)
        return self._found if rows is None else self._found.of(rows)

    def sensed(self, inputs: Sequence[Tensor], rows: Tensor | None = None, kind: str = "backward") -> Linearised:
        """Sense the Jacobians, whatever is kept of others.

        Args:
            inputs: of the pass.
            rows: which of them; None: all.
            kind: what the calls are counted as.
        """
        batch = self.batch(inputs)
        if rows is not None:
            few = [x[rows.to(x.device)] for x in inputs]
            batch = Batch(self.box.caller, few, batch.argnums, self.seed, rows)
        start = self._start if rows is None or self._start is None else self._start[rows]
        return self.box.sensor.linearise(batch.x, start, batch.precision, batch.outputs, batch.evaluate, kind)

    def pull(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return `J^T v` for every input that is differentiated; samples whose `v` is 0 are not sensed."""
        v, batch = flattened(cotangents), self.batch(inputs)
        rows = torch.nonzero((v != 0).any(1)).flatten()
        # A seed is that of the whole batch, and what is kept is, too.
        if len(rows) == len(v) or self.seed is not None or self._found is not None or self.box.reuse.is_on:
            found = self.linearise(inputs).pull(v)
        else:
            found = torch.zeros(len(v), batch.x.shape[1], dtype=torch.float64)
            if len(rows):
                found[rows] = self.linearise(inputs, rows).pull(v[rows])
        own = [inputs[i] for i in batch.argnums]
        return [part.to(x.dtype) for part, x in zip(batch.split(found), own, strict=True)]

    def push(self, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
        """Return `J u` for every output, from a tangent for every input that is differentiated."""
        return self._outputs(self.linearise(inputs).push(flattened(tangents)), inputs)

    def products(self, inputs: Sequence[Tensor], factors: Sequence[Tensor], *, is_pull: bool) -> tuple[Tensor, ...]:
        """Return `J^T v` or `J u` for each of K cotangents or tangents, `(K, N, ...)`, from Jacobians that are sensed once."""
        multiply = self.pull if is_pull else self.push
        if len(factors[0]) > 1:
            self.linearise(inputs)
        each = [multiply(inputs, [factor[k] for factor in factors]) for k in range(len(factors[0]))]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    def _outputs(self, flat: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return flat outputs `(N, m)` as those of the layer."""
        shapes = self.box.caller.shapes
        parts = flat.split([math.prod(shape) for shape in shapes], 1)
        return self.cast([p.reshape(len(p), *shape) for p, shape in zip(parts, shapes, strict=True)], inputs)

    def cast(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the box's outputs on the device and in the precision of the layer's input."""
        like = inputs[self.argnums(inputs)[0]]
        return [leaf.to(like.device, like.dtype) for leaf in leaves]
