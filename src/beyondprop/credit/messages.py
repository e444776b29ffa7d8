"""Tensors of any shape and dtype from one rank to its neighbour, in order, while both compute.

A message is one buffer of bytes in host memory, a header before the tensor's own, so that its receive can be posted before its
shape is known: every message is as long as the longest so far, and one that needs more says so and comes again, whole.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FIELDS = 16
_HEADER = 8 * _FIELDS
_MOST_DIMENSIONS = _FIELDS - 7


class Kind(IntEnum):
    """What a message says."""

    TENSOR = 0
    END = 1
    FAILED = 2


class Message(NamedTuple):
    """What came.

    Attributes:
        kind: what it says.
        batch: of which batch; for `END`, how many there were.
        rank: who said it first.
        is_answered: whether a delta is to be sent back.
        tensor: what was sent, in host memory; of no elements where the message is none of a tensor.
    """

    kind: Kind
    batch: int
    rank: int
    is_answered: bool
    tensor: Tensor


class Outbox:
    """Sends messages to one rank.

    Args:
        peer: the rank in the group.
        tag: of this direction between the two.
        group: the process group.
        most: how many messages may be on their way; one more waits for the first of them.
    """

    def __init__(self, peer: int, tag: int, group: dist.ProcessGroup, most: int) -> None:
        self.peer, self._tag, self._group, self._most = peer, tag, group, most
        self._length = _HEADER
        self._sent: deque[Any] = deque()

    def send(
        self, kind: Kind, batch: int, rank: int, tensor: Tensor | None = None, *, is_answered: bool = False
    ) -> None:
        """Begin to send a message; the tensor may be overwritten at once."""
        body = torch.empty(0) if tensor is None else tensor
        if body.dtype not in _DTYPES or body.ndim > _MOST_DIMENSIONS:
            raise TypeError(
                f"A tensor of {body.dtype} with {body.ndim} dimensions cannot go from rank to rank: float32, float64, float16 "
                f"or bfloat16 with at most {_MOST_DIMENSIONS} can."
            )
        size = body.numel() * body.element_size()
        grows = _HEADER + size > self._length
        header = [kind, batch, rank, is_answered, _HEADER + size if grows else 0, _DTYPES.index(body.dtype), body.ndim]
        fields = torch.tensor([*header, *body.shape, *[0] * (_MOST_DIMENSIONS - body.ndim)])
        if grows:
            self._put(fields, None)
            self._length = _HEADER + size
        self._put(fields, body)

    def _put(self, fields: Tensor, body: Tensor | None) -> None:
        buffer = torch.empty(self._length, dtype=torch.uint8)
        buffer[:_HEADER].view(torch.int64).copy_(fields)
        if body is not None:
            _shown(buffer, body.dtype, body.shape).copy_(body.detach())
        self._sent.append(dist.isend(buffer, group=self._group, tag=self._tag, group_dst=self.peer))
        self.finish(self._most)

    def finish(self, most: int = 0) -> None:
        """Wait until all but the last so many have been received."""
        while len(self._sent) > most:
            with _named(self.peer):
                self._sent.popleft().wait()

    def fail(self, batch: int, rank: int, patience: timedelta) -> None:
        """Tell that a rank failed, where the other one is still there to hear it."""
        with contextlib.suppress(RuntimeError):
            self.send(Kind.FAILED, batch, rank)
            while self._sent:
                self._sent.popleft().wait(patience)


class Inbox:
    """Receives messages from one rank; arguments as of `Outbox`."""

    def __init__(self, peer: int, tag: int, group: dist.ProcessGroup) -> None:
        self.peer, self._tag, self._group = peer, tag, group
        self._length = _HEADER
        self._posted: tuple[Any, Tensor] | None = None

    def post(self) -> None:
        """Be ready for the next message, which then comes while this rank computes."""
        if self._posted is None:
            buffer = torch.empty(self._length, dtype=torch.uint8)
            self._posted = dist.irecv(buffer, group=self._group, tag=self._tag, group_src=self.peer), buffer

    def take(self) -> Message:
        """Return the next message, when it has come.

        Raises:
            RuntimeError: if the other rank has gone, or takes longer than the group's timeout.
        """
        buffer, fields = self._received()
        if fields[4]:
            self._length = fields[4]
            buffer, fields = self._received()
        kind, batch, rank, is_answered, _, dtype, ndim, *shape = fields
        body = _shown(buffer, _DTYPES[dtype], torch.Size(shape[:ndim]))
        return Message(Kind(kind), batch, rank, bool(is_answered), body)

    def _received(self) -> tuple[Tensor, list[int]]:
        self.post()
        assert self._posted is not None
        work, buffer = self._posted
        with _named(self.peer):
            work.wait()
        self._posted = None
        return buffer, buffer[:_HEADER].view(torch.int64).tolist()


@contextlib.contextmanager
def _named(peer: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"Rank {peer} has gone, or took longer than the timeout of the process group.") from error


def _shown(buffer: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Return a message's tensor as a view of its bytes."""
    size = shape.numel() * dtype.itemsize
    return buffer[_HEADER : _HEADER + size].view(dtype).view(shape)
