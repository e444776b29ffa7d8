"""The way back along a chain as an iterator, for learning rules that ask for a block's input and output."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.reversible.back import Undone, WayBack
from beyondprop.nn.reversible.couplings import Coupling
from beyondprop.nn.reversible.passes import Pass, Place
from beyondprop.nn.reversible.replay import is_same
from beyondprop.nn.reversible.streams import Streams

Value = Tensor | Streams


class Unwound:
    """A block on the way back; unpacks into `block, x_in, y_out, cotangent`.

    Attributes:
        block: the coupling.
        x_in: its input, a tensor or a pair as the chain's.
        y_out: its output.
        cotangent: that of `y_out`.
    """

    def __init__(
        self, block: Coupling, x_in: Any, y_out: Any, cotangent: Any, walk: WayBack, undone: list[Undone]
    ) -> None:
        self.block, self.x_in, self.y_out, self.cotangent = block, x_in, y_out, cotangent
        self._walk, self._undone = walk, undone

    def __iter__(self) -> Iterator[Any]:
        return iter((self.block, self.x_in, self.y_out, self.cotangent))

    def pull(self, cotangent: Value | None = None) -> tuple[Any, dict[Tensor, Tensor]]:
        """Return the cotangent of `x_in` and the gradients of the block's weights, by parameter.

        Args:
            cotangent: that of `y_out`, if another than `cotangent`.
        """
        walk, shape = self._walk, self._walk.way.shape
        above = self.cotangent if cotangent is None else cotangent
        walk.gradients = [None] * len(walk.aliases)
        with torch.no_grad():
            below = shape.owned([above] if isinstance(above, Tensor) else above)
            for undone in self._undone:
                walk.pull(undone, below, retain=True)
            calls = [undone.place.call for undone in self._undone if undone.place.call is not None]
            slots = {index: slot for call in calls for index, slot in call.slots.items()}
            found = {owner[key]: g for index, (owner, key) in slots.items() if (g := walk.gradients[index]) is not None}
            return shape.join((below[0], below[1])), found


def unwound(way: Pass, y: Value, dy: Value, blocks: Sequence[Coupling]) -> Generator[Unwound, Any, None]:
    """Yield the blocks of a pass with what goes in and comes out, last first; see `ReversibleSequential.unwind`."""
    walk = WayBack(way, way.shape.split(y), way.arguments.taken())
    y_out, cotangent = y, dy
    for number in reversed(range(len(blocks))):
        undone = [_undo(walk, place, pulls=True) for place in reversed(way.places) if place.block == number]
        x_in = way.shape.join((walk.streams[0], walk.streams[1]))
        item = Unwound(blocks[number], x_in, y_out, cotangent, walk, undone)
        sent = yield item
        y_out, cotangent = x_in, item.pull()[0] if sent is None else sent
        del item, undone


def reconstructed(way: Pass, y: Value) -> Any:
    """Return the input of a pass from its output; see `ReversibleSequential.inverse`."""
    return way.given_back(way.shape.join(streams_before(way, y)))


@torch.no_grad()
def streams_before(way: Pass, y: Value) -> Streams:
    """Return the streams at the start of a pass from its output, in their own precision."""
    walk = WayBack(way, way.shape.split(y), way.arguments.taken())
    for place in reversed(way.places):
        _undo(walk, place, pulls=False)
    return walk.streams[0], walk.streams[1]


def _undo(walk: WayBack, place: Place, pulls: bool) -> Undone:
    """Undo one step and leave everything around it as it is, or refuse if its random numbers are not known."""
    way = walk.way
    with way.surroundings(walk.aliases), way.random.kept():
        before = way.random.get()
        with walk.at(place):
            undone = walk.undo(place, pulls=pulls)
        if place.call is not None and place.call.random is None and not is_same(before, way.random.get()):
            raise UnsupportedModelError(
                f"Function {place.call.name} draws random numbers, and this output does not know which: pass the one that "
                "forward() returned with gradients on, or call eval() before forward()."
            )
    return undone
