"""A batch before a black box: its inputs as flat rows, its outputs as flat rows, all of its calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from beyondprop.errors import NonFiniteError
from beyondprop.func.sensing.calls import Caller, Outcome

_NARROW = (torch.float16, torch.bfloat16)


class Batch:
    """Inputs of a black box.

    Args:
        caller: the box.
        inputs: what it takes, each `(B, ...)`; half precision is widened, as no derivative can be taken in it.
        argnums: which of them are differentiated.
        seed: of the simulator, for all calls of this batch.
        rows: their numbers in a larger batch, which errors name; None: this is the whole.

    Attributes:
        x: the differentiated inputs, flat, `(B, n)`.
        given: their precisions, before half was widened.

    Raises:
        NonFiniteError: if an input that is differentiated holds NaN or Inf.
        TypeError: if an input that is differentiated is no float tensor.
        ValueError: if the batch is empty, or the inputs have unlike numbers of rows.
    """

    def __init__(
        self,
        caller: Caller,
        inputs: Sequence[Tensor],
        argnums: Sequence[int],
        seed: int | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.caller, self.argnums, self.seed, self.rows = caller, tuple(argnums), seed, rows
        _check(inputs, self.argnums)
        self.inputs = [x.detach().float() if x.dtype in _NARROW else x.detach() for x in inputs]
        self.given = tuple(inputs[i].dtype for i in self.argnums)
        wanted = [self.inputs[i] for i in self.argnums]
        self.shapes = [x.shape[1:] for x in wanted]
        self.dtypes = [x.dtype for x in wanted]
        self.devices = [x.device for x in wanted]
        self.widths = [math.prod(shape) for shape in self.shapes]
        flat = [x.reshape(len(x), -1) for x in wanted]
        self.x = torch.cat(flat, 1).cpu() if len(flat) > 1 else flat[0].cpu()
        if not math.isfinite(self.x.sum().item()):  # one pass; what overflows is looked at row by row
            self._check_finite()

    def _check_finite(self) -> None:
        bad = torch.nonzero(~self.x.isfinite())
        if len(bad):
            sample, place = bad[0].tolist()
            raise NonFiniteError(
                f"Input {place} of sample {self.number(sample)} of a black box is {float(self.x[sample, place])}; it was not "
                "called.",
                "input of a black box",
            )

    def __len__(self) -> int:
        return len(self.x)

    def number(self, row: int) -> int:
        """Return a row's number in the batch that errors speak of."""
        return row if self.rows is None else int(self.rows[row])

    @property
    def outputs(self) -> int:
        """Numbers that the box returns for a row; known after its first call."""
        assert self.caller.shapes is not None
        return sum(math.prod(shape) for shape in self.caller.shapes)

    def value(self, kind: str) -> list[Tensor]:
        """Call the box at the inputs: each output `(B, ...)`."""
        return self.caller(self.inputs, kind, seed=self.seed).leaves

    @property
    def precision(self) -> float:
        """The relative precision of the box's numbers, as far as it is known: of its inputs or outputs, the coarser."""
        return max(self.caller.precision, *(torch.finfo(x).eps for x in self.dtypes))

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return flat rows `(R, n)` as the differentiated inputs, in their own precision and on their own devices."""
        parts = flat.split(self.widths, dim=1)
        own = zip(parts, self.shapes, self.dtypes, self.devices, strict=True)
        return [part.reshape(len(flat), *shape).to(device, dtype) for part, shape, dtype, device in own]

    def evaluate(
        self, points: Tensor, samples: Tensor, kind: str, where: Callable[[int, int], str], may_drop: bool
    ) -> Outcome:
        """Call the box at points `(G, S, n)` in place of the inputs of `S` samples; one output, `(G * S, m)` float64.

        Inputs of unlike precision are rounded in `points`, too, so that these are what the box was given.
        """
        if len(set(self.dtypes)) > 1:
            for part, dtype in zip(points.split(self.widths, dim=-1), self.dtypes, strict=True):
                part.copy_(part.to(dtype))
        groups, rows = points.shape[:2]
        together = self.caller.settings.seed_kwarg is None
        found = []
        # Each group is a call of its own where they are to share a seed.
        for low in range(0, groups, groups if together else 1):
            part = points[low : low + (groups if together else 1)]
            own = iter(self.split(part.flatten(0, 1)))
            inputs = [
                next(own) if index in self.argnums else x[samples.to(x.device)].repeat(len(part), *[1] * (x.ndim - 1))
                for index, x in enumerate(self.inputs)
            ]
            found.append(
                self.caller(
                    inputs,
                    kind,
                    seed=self.seed,
                    where=lambda row, low=low: where(low + row // rows, self.number(int(samples[row % rows]))),
                    may_drop=may_drop,
                )
            )
        flat = torch.cat([flattened(each.leaves) for each in found])
        if all(each.missing is None for each in found):
            return Outcome([flat], None)
        missing = [
            torch.zeros(len(each.leaves[0]), dtype=torch.bool) if each.missing is None else each.missing
            for each in found
        ]
        return Outcome([flat], torch.cat(missing))


def flattened(leaves: Sequence[Tensor]) -> Tensor:
    """Return outputs, each `(R, ...)`, as `(R, m)` float64 on the CPU."""
    flat = [leaf.detach().reshape(len(leaf), -1).to("cpu", torch.float64) for leaf in leaves]
    return torch.cat(flat, 1) if len(flat) > 1 else flat[0]


def _check(inputs: Sequence[Tensor], argnums: Sequence[int]) -> None:
    for index, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"Input {index} of the black box must be a tensor, got {type(x).__name__}.")
        if x.ndim == 0:
            raise ValueError(
                f"Input {index} of the black box must have the batch as its first dimension, got a scalar."
            )
        if len(x) != len(inputs[0]):
            raise ValueError(
                f"Inputs of the black box must have equally many rows, got {len(inputs[0])} and {len(x)}; give what the rows "
                "share by expand(), or by functools.partial."
            )
    if not len(inputs[0]):
        raise ValueError(
            f"The batch is empty: the black box got the shape {tuple(inputs[0].shape)}, and needs one row or more."
        )
    for index in argnums:
        if not -1 < index < len(inputs):
            raise ValueError(f"argnums names input {index}, and the black box got {len(inputs)}.")
        if not inputs[index].is_floating_point():
            kind = str(inputs[index].dtype).removeprefix("torch.")
            raise TypeError(
                f"Input {index} of the black box is {kind}; what is differentiated must be floats: convert it, or "
                "name a layer's float inputs in argnums."
            )
