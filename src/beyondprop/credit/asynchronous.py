"""Credit on a pipeline that never stops to be emptied: every rank updates as soon as its delta has come.

Each rank runs some stages of a chain, batch after batch, up; deltas come down. A rank updates while the ranks below still wait
for their deltas, and the next batches are on their way up meanwhile. With K ranks, rank 0 the lowest, and S batches allowed in
flight, rank r makes S_r = min(S, K - r) forward passes F, and from then on a backward pass with its update, B, after each:

    F ... F B F B F B ...

So in a forward pass, t batches after the last drain, its weights lack exactly the last min(t, S_r - 1) updates. This is one
forward, one backward in turn without flushes, with the weights held for the backward pass of the same batch: Narayanan et al.,
"PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, arXiv 1806.03377, section 3.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from beyondprop import _checks
from beyondprop.credit.behind_backward import Part
from beyondprop.credit.held_weights import Copy, HeldWeights
from beyondprop.credit.messages import Inbox, Kind, Message, Outbox
from beyondprop.stages.losses import LossFunction, OutputLoss

_PATIENCE = timedelta(seconds=5)
"""How long a rank that failed waits for a neighbour to hear of it."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch whose delta has not come."""

    batch: int
    z: Tensor
    result: Tensor  # the output, on the last rank the loss
    weights: Copy | None


class AsynchronousPipeline:
    """Trains the parts of a `Credited` on the ranks of a process group, each rank updating as soon as its delta has come.

    Rank r of K has at most `min(in_flight, K - r)` batches whose deltas have not come, and makes its passes in a fixed order:
    a training is repeatable. In a forward pass its weights are `staleness` updates old, fewer in the first batches and in those
    after a `drain`; a backward pass has the weights of its own forward pass. With `in_flight=1` ranks take turns, and the
    training is that of one process.

    Building one, `drain` and `share` are calls that all ranks of the group make. What goes from rank to rank goes through host
    memory, by the group's backend for CPUs.

    Args:
        part: this rank's stages, of `Credited.part`; rank 0 has the first stages, the last rank the last.
        optimizer: over the part's parameters; None for a part that is frozen.
        loss: `loss(output, target)`, 0-d, on the last rank; default: that of the `Credited`.
        in_flight: S, >= 1, the same on all ranks. Default: as many as there are ranks, with which all are at work all the time.
        group: the process group, one rank for each part; its timeout bounds how long a rank waits. Default: all processes.

    Attributes:
        part: see above.
        optimizer: see above.
        in_flight: how many batches are in flight on this rank, `min(S, K - r)`.
        staleness: how many updates its weights lack in a forward pass, `in_flight - 1`.
        batches: how many batches went up so far.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind, or the parts are not one chain; on all ranks.
        RuntimeError: if there is no process group, or none that CPUs can use. In `step` and `drain`, if another rank failed,
            has gone, or has another number of batches; the pipeline cannot be used any more then.

    Example:
        On each of two ranks that `torchrun` starts::

            part = model.part(0, 2) if rank == 0 else model.part(2, 4)
            pipeline = AsynchronousPipeline(part, torch.optim.Adam(part.parameters()))
            for x, y in batches:
                pipeline.step(x, y)
            pipeline.drain()
    """

    _number = 0

    def __init__(
        self,
        part: nn.Module,
        optimizer: Optimizer | None,
        loss: LossFunction | None = None,
        *,
        in_flight: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "There is no process group: call torch.distributed.init_process_group under torchrun first."
            )
        self._group = dist.distributed_c10d._get_default_group() if group is None else group
        if "cpu" not in dist.get_backend_config(self._group):
            raise RuntimeError(
                f"The process group's backend is {dist.get_backend(self._group)!r}, which CPUs cannot use: give "
                "init_process_group 'gloo', or 'cpu:gloo,cuda:nccl'."
            )
        self.rank, self._ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError("This process is not in the group that was given.")
        is_last = self.rank == self._ranks - 1
        wanted = self._ranks if in_flight is None else in_flight
        refusal: Exception | None = None
        try:
            self.part = _checked(part, optimizer)
            _checks.at_least("in_flight", wanted, 1)
            if loss is None and is_last and self.part.owner.output_loss is None:
                raise ValueError("The last rank needs loss=, as this Credited was built without one.")
            given = self.part.owner.output_loss if loss is None else OutputLoss(loss)
        except (TypeError, ValueError) as error:
            refusal, given = error, None
        self.cuts, number = self._agreed(refusal, wanted)
        self.optimizer, self._loss = optimizer, given
        self.in_flight = min(wanted, self._ranks - self.rank)
        self.staleness = self.in_flight - 1
        self.batches = 0
        self._flights: deque[_Flight] = deque()
        self._weights = HeldWeights(list(self.part.parameters()))
        self._is_drained = True
        self._failed: str | None = None
        self._up, self._down = 2 * number, 2 * number + 1
        self._below: tuple[Inbox, Outbox] | None = (
            self._link(self.rank - 1, self._up, self._down) if self.rank else None
        )
        self._above: tuple[Inbox, Outbox] | None = None if is_last else self._link(self.rank + 1, self._down, self._up)

    def step(self, x: Tensor | None = None, target: Tensor | None = None) -> Tensor | None:
        """Send one batch up, and make the update that is due.

        Args:
            x: `(N, ...)`; asked for on the first rank, others may give it or not.
            target: what the loss takes; asked for on the last rank.

        Returns:
            The loss of this batch, 0-d, on the last rank; None on the others.
        """
        with self._named(self.batches):
            if self.optimizer is None and any(p.requires_grad for p in self.part.parameters()):
                raise ValueError(
                    "A parameter of this part was thawed, which has no optimizer; build the pipeline anew with one."
                )
            self._is_drained = False
            z = self._taken(x)
            weights = self._weights.copy() if self.staleness else None
            with self._weights.shown(weights):
                result = self.part(z)
            if self._above is None:
                result = self._lost(result, target)
            else:
                self._above[1].send(Kind.TENSOR, self.batches, self.rank, result, is_answered=result.requires_grad)
            if result.requires_grad:
                self._flights.append(_Flight(self.batches, z, result, weights))
                if self._above is not None:
                    self._above[0].post()
            if len(self._flights) == self.in_flight:
                self._update()
            self.batches += 1
            return result.detach() if self._above is None else None

    def drain(self) -> None:
        """Wait for all deltas and make their updates: before evaluation, a checkpoint, or the end of the program.

        Afterwards the part's weights are those after all batches, and staleness begins anew.
        """
        with self._named(self.batches):
            while self._flights:
                self._update()
            self._batch = self.batches
            if self._below is not None:
                self._check(self._below[0].take(), Kind.END, self.rank - 1)
            # Up and down again, so that nobody goes on before all have come here.
            if self._above is not None:
                self._above[1].send(Kind.END, self.batches, self.rank)
                self._check(self._above[0].take(), Kind.END, self.rank + 1)
            if self._below is not None:
                self._below[1].send(Kind.END, self.batches, self.rank)
            for link in filter(None, (self._below, self._above)):
                link[1].finish()
            self._is_drained = True

    @torch.no_grad()
    def share(self) -> None:
        """Give every rank the weights, buffers and feedback of all parts, so that each has the whole model; after `drain`."""
        if not self._is_drained:
            raise RuntimeError("Batches are in flight: call drain() on all ranks first.")
        for rank, (first, end) in enumerate(self.cuts):
            for stage in self.part.owner.chain.stages[first:end]:
                buffers = [b for module in stage.modules for b in module.buffers()]
                for tensor in (*stage.parameters, *buffers, *stage.feedback.values()):
                    sent = tensor.detach().to("cpu").contiguous()
                    dist.broadcast(sent, group=self._group, group_src=rank)
                    if rank != self.rank:
                        tensor.copy_(sent)

    def _link(self, peer: int, inward: int, outward: int) -> tuple[Inbox, Outbox]:
        return Inbox(peer, inward, self._group), Outbox(peer, outward, self._group, self._ranks + 1)

    def _agreed(self, refusal: Exception | None, in_flight: int) -> tuple[list[tuple[int, int]], int]:
        """Return all ranks' stages, and a number that no other pipeline of theirs has, or raise on all ranks alike."""
        mine = (
            (str(refusal),)
            if refusal
            else (None, (self.part.first, self.part.end), len(self.part.owner.chain), in_flight)
        )
        told: list[Any] = [None] * self._ranks
        dist.all_gather_object(told, (AsynchronousPipeline._number + 1, *mine), group=self._group)
        number = AsynchronousPipeline._number = max(other[0] for other in told)
        if refusal is not None:
            raise refusal
        for rank, other in enumerate(told):
            if other[1] is not None:
                raise ValueError(f"Rank {rank} of {self._ranks} was refused: {other[1]}")
        _, _, cuts, sizes, depths = zip(*told, strict=True)
        starts, ends = [first for first, _ in cuts], [end for _, end in cuts]
        if len(set(sizes)) > 1 or starts != [0, *ends[:-1]] or ends[-1] != sizes[0]:
            raise ValueError(
                f"The ranks' parts must be one chain of {' or '.join(map(str, sorted(set(sizes))))} stages, one part a rank, "
                f"from the first to the last; the {self._ranks} ranks have {', '.join(f'{a} to {b}' for a, b in cuts)}."
            )
        if len(set(depths)) > 1:
            raise ValueError(f"in_flight must be the same on all ranks, got {', '.join(map(str, depths))}.")
        return list(cuts), number

    def _taken(self, x: Tensor | None) -> Tensor:
        """Return what comes into the part."""
        if self._below is None:
            if not isinstance(x, Tensor) or not x.ndim or not len(x):
                what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"The first rank needs x, a tensor of one sample or more, got {what}.")
            return x.detach()
        message = self._below[0].take()
        self._check(message, Kind.TENSOR, self.rank - 1)
        self._below[0].post()
        z = message.tensor.to(next(self.part.parameters()).device)
        return z.requires_grad_() if message.is_answered else z

    def _lost(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the loss on the last rank."""
        if target is None:
            raise ValueError("The last rank needs the target of the loss, got None.")
        if not output.requires_grad:
            raise ValueError("No parameter of any part requires a gradient: there is nothing to train.")
        assert self._loss is not None
        if isinstance(target, Tensor):
            self._loss.check(output, target)
        return self._loss(output, target)

    def _update(self) -> None:
        """Make the update of the batch that has been in flight for longest."""
        flight = self._flights.popleft()
        self._batch = flight.batch
        delta: Tensor | None = None
        if self._above is not None:
            message = self._above[0].take()
            self._check(message, Kind.TENSOR, self.rank + 1)
            if self._flights:
                self._above[0].post()
            delta = message.tensor.to(flight.result.device)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        with self._weights.shown(flight.weights):
            torch.autograd.backward(flight.result, delta)
        if flight.z.requires_grad and self._below is not None:  # the ranks below need not wait for the optimizer
            assert flight.z.grad is not None
            self._below[1].send(Kind.TENSOR, flight.batch, self.rank, flight.z.grad)
        if self.optimizer is not None:
            self.optimizer.step()
            torch.clear_autocast_cache()  # it holds casts of the weights before
        if flight.weights is not None:
            self._weights.give_back(flight.weights)

    def _check(self, message: Message, wanted: Kind, sender: int) -> None:
        """Raise `RuntimeError` where the message is not the one that the order of passes asks for."""
        if message.kind is Kind.FAILED:
            raise _OtherRank(message.rank, message.batch, sender)
        if message.kind is not wanted:
            does, other = ("makes a step", "drains") if wanted is Kind.TENSOR else ("drains", "has sent another")
            raise RuntimeError(
                f"Rank {self.rank} {does} after {self.batches} batches, while rank {sender} {other}: all ranks must make the "
                "same number of steps between two drains."
            )
        assert message.batch == self._batch, f"rank {sender} sent batch {message.batch} in place of {self._batch}"

    @contextlib.contextmanager
    def _named(self, batch: int) -> Iterator[None]:
        """Return a context that names rank and batch in an error, and tells the neighbours of it."""
        if self._failed is not None:
            raise RuntimeError(f"This pipeline cannot go on, as {self._failed}; build it anew on all ranks.")
        self._batch = batch
        try:
            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                raise RuntimeError(
                    "A pipeline trains: call step and drain outside torch.no_grad and torch.inference_mode."
                )
            yield
        except BaseException as error:
            other = error if isinstance(error, _OtherRank) else None
            batch, rank = (self._batch, self.rank) if other is None else (other.batch, other.rank)
            self._failed = f"rank {rank} failed in batch {batch}"
            error.add_note(f"Rank {self.rank} of {self._ranks}, batch {self._batch} (counted from 0).")
            for link in filter(None, (self._below, self._above)):
                if other is None or link[1].peer != other.sender:  # who told it listens no more
                    link[1].fail(batch, rank, _PATIENCE)
            self._flights.clear()
            raise


class _OtherRank(RuntimeError):
    """Another rank failed."""

    def __init__(self, rank: int, batch: int, sender: int) -> None:
        super().__init__(f"Rank {rank} failed in batch {batch}; its own error says why.")
        self.rank, self.batch, self.sender = rank, batch, sender


def _checked(part: Any, optimizer: Any) -> Part:
    """Return the part, or raise where it or its optimizer is not what a pipeline takes."""
    if not isinstance(part, Part):
        raise TypeError(f"part must be one of Credited.part(first, end), got {type(part).__name__}.")
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}.")
    names = {p: name for name, p in part.owner.model.named_parameters()}
    own = {p for p in part.parameters() if p.requires_grad}
    stepped = {p for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    for p in stepped - set(part.parameters()):
        raise ValueError(
            f"optimizer has {names.get(p, 'a parameter that the model has not')!r}, which is not of the part {part.first} to "
            f"{part.end}: build it over part.parameters()."
        )
    for p in own - stepped:
        raise ValueError(
            f"optimizer has not {names.get(p, 'a parameter')!r} of the part {part.first} to {part.end}: build it over "
            "part.parameters(), or freeze what is not to be trained."
        )
    return part
