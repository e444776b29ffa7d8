"""Fixed random feedback: feedback alignment and direct feedback alignment.

With W_l the weights of stage l, f the nonlinearity before them, e the gradient of a sample's loss at the output and B fixed
random tensors:

| rule | delta at the output of stage l |
|---|---|
| backpropagation | `W_{l+1}^T delta_{l+1} * f'(z_l)` |
| feedback alignment | `B_{l+1}^T delta_{l+1} * f'(z_l)` |
| direct feedback alignment | `-B_l e * f'(z_l)` |

Sources: Lillicrap, Cownden, Tweed & Akerman, "Random synaptic feedback weights support error backpropagation for deep
learning", Nature Communications 7, 2016; Nøkland, "Direct feedback alignment provides learning in deep neural networks", NIPS
2016, arXiv 1609.01596, equations 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.credit.base import Credit
from beyondprop.credit.code_problem import flat
from beyondprop.nn import ElmanCell, Positions, Recurrent
from beyondprop.stages import BlockStage, Chain, LossPoint, Pullback, Stage
from beyondprop.stages.block import BlockPullback
from beyondprop.stages.stage import NORMS
from beyondprop.stages.weight_transport import counterpart

_NO_MAPS = (*NORMS, nn.Embedding, Positions)
_LAYERS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_CELLS = (ElmanCell, nn.RNNCell, nn.GRUCell, nn.LSTMCell)


class FeedbackAlignment(Credit):
    """Deltas go down through fixed random tensors instead of the weights; slopes are those of the forward pass.

    Every weight of two or more dimensions that deltas go through has a feedback tensor of its shape, normally distributed: all
    but those that only the network's input meets (the first layer, unless it is a `CreditBlock`'s; in a recurrent one its input
    weights), embeddings, and the gains of normalisations, which are no map between units. A block (attention, recurrence,
    BatchNorm, a residual block), be it the first stage, sends deltas through the feedback of its weights and keeps its skips,
    which have none.

    Args:
        scale: > 0; standard deviation of the feedback, in units of the root mean square of the weights when the rule is
            built. Where these are all 0, their unit is `1 / sqrt(fan-in)`.
        seed: >= 0, of the feedback; torch's global random state has no part in it.

    Example:
        >>> from beyondprop import Descent, LocalRule
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> rule = LocalRule(model, nn.CrossEntropyLoss(), FeedbackAlignment(), Descent())
        >>> result = rule.step(torch.randn(16, 4), torch.randint(3, (16,)))
    """

    needs_codes = False

    def __init__(self, *, scale: float = 1.0, seed: int = 0) -> None:
        self.scale = _checks.positive("scale", scale)
        self.seed = _checks.at_least("seed", seed, 0)
        self._homes: dict[str, tuple[Stage, nn.Parameter]] = {}

    def bind(self, chain: Chain) -> None:
        super().bind(chain)
        names = {p: name for name, p in chain.model.named_parameters()}
        for index, stage in enumerate(chain):
            generator = _generator(self.seed, index)
            aside = _never_crossed(stage) | (set() if index or self.is_inside else _met_by_data_alone(stage))
            for number, weight in enumerate(stage.parameters):
                if weight.ndim >= 2 and weight not in aside:
                    name = names.get(weight, f"{stage.name}.{number}")  # a block may have what the model does not list
                    self._homes[name] = stage, weight
                    drawn = _normal(weight.shape, self.scale * _size(weight), generator)
                    stage.feedback[weight] = counterpart(weight, drawn)

    @property
    def feedback(self) -> dict[str, Tensor]:
        """The feedback by the name of the weight whose place it takes."""
        return {name: stage.feedback[weight] for name, (stage, weight) in self._homes.items()}

    def below(self, index: int, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> Tensor:
        return pullback(delta)

    def state_dict(self) -> dict[str, object]:
        return {"feedback": self.feedback}

    def tensors(self) -> dict[str, Tensor]:
        return _named(self.feedback)

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        self.load_state_dict({"feedback": _unnamed(self, saved)})

    def load_state_dict(self, state: dict[str, object]) -> None:
        saved: Any = state["feedback"]
        _check_saved(saved, {name: tuple(weight.shape) for name, (_, weight) in self._homes.items()})
        for name, (stage, weight) in self._homes.items():
            stage.feedback[weight] = counterpart(weight, saved[name].detach().clone())


class DirectFeedbackAlignment(Credit):
    """Every stage's delta is the output error times a fixed random matrix, times the slope of the nonlinearity that follows.

    One path a stage: nothing comes down through weights, blocks or skips, so that all deltas are known as soon as the loss
    is. The slope is that of what the stage above does before its first parameter (nonlinearity, pooling, dropout); the
    matrix has one column for each number that this hands to the stage above's weights. Where the stage above is a residual
    block, the projected error is the delta at the block's input as it is.

    Args:
        scale: > 0; the entries' standard deviation is `scale / sqrt(columns)`: an error keeps its length, as it does in
            backpropagation under He's initialisation.
        seed: >= 0, of the matrices; torch's global random state has no part in it. They are drawn with the first batch,
            whose shape says how large they are, each by its own seed.
    """

    of_batch = ("_error",)
    reaches_input = False

    def __init__(self, *, scale: float = 1.0, seed: int = 0) -> None:
        self.scale = _checks.positive("scale", scale)
        self.seed = _checks.at_least("seed", seed, 0)
        self.feedback: dict[str, Tensor] = {}
        """The matrices `(output size, size before the next weights)`, by the name of the stage whose delta they make."""
        self._drawn: list[str] = []  # by a batch that may still be refused
        self._error: Tensor  # of the present batch

    def bind(self, chain: Chain) -> None:
        super().bind(chain)
        self._heads: list[BlockStage | None] = [_head(stage) for stage in chain]
        self.needs_codes = any(self._heads)

    @property
    def _shapes(self) -> dict[str, list[list[int]]]:
        return {stage.name: [list(p.shape) for p in stage.parameters] for stage in self._chain}

    def below(self, index: int, pullback: Pullback, delta: Tensor, loss: LossPoint | None) -> Tensor:
        if loss is not None:
            self._error = flat(delta.detach())
        head = self._heads[index]
        if head is None:
            return pullback.pull_head(self._project(index, pullback.head_shape))
        assert isinstance(pullback, BlockPullback)
        # The head comes first in its stage, so that the same random state draws the same masks.
        with head.replayed(pullback.random_state, pullback.input.device):
            slope = BlockPullback(head, pullback.input, False, pullback.random_state)
        return slope(self._project(index, slope.output.shape))

    def _project(self, index: int, shape: torch.Size) -> Tensor:
        error, name = self._error, self._chain[index - 1].name
        size = torch.Size((error.shape[1], shape[1:].numel()))
        matrix = self.feedback.get(name)
        if matrix is None:
            self._drawn.append(name)
            matrix = _normal(size, self.scale / size[1] ** 0.5, _generator(self.seed, index - 1))
        if matrix.shape != size:
            raise ValueError(
                f"The feedback of stage {name!r} takes {matrix.shape[0]} outputs to {matrix.shape[1]} units, this batch has "
                f"{size[0]} and {size[1]}: direct feedback needs inputs of one size."
            )
        matrix = self.feedback[name] = matrix.to(error)
        return torch.matmul(error, matrix).to(error.dtype).view(error.shape[0], *shape[1:])

    def update(self) -> None:
        self._drawn.clear()

    def discard(self) -> None:
        """Forget what the batch made necessary to draw; it will be drawn again, and the same."""
        while self._drawn:
            del self.feedback[self._drawn.pop()]

    def state_dict(self) -> dict[str, object]:
        """Return the matrices, none before the first batch, and what network they are for, where a rule has given one."""
        state: dict[str, object] = {"feedback": dict(self.feedback)}
        return state | {"weights": self._shapes} if hasattr(self, "_chain") else state

    def tensors(self) -> dict[str, Tensor]:
        return _named(self.feedback)

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        self.load_state_dict({"feedback": _unnamed(self, saved)})

    def load_state_dict(self, state: dict[str, object]) -> None:
        saved: Any = state["feedback"]
        if not hasattr(self, "_chain"):
            if saved:
                raise ValueError(
                    "This DirectFeedbackAlignment has no network yet: build a rule with it, and load the rule's state."
                )
            return
        known = {stage.name for stage in self._chain.stages[:-1]}
        _check_saved(saved, {name: tuple(saved[name].shape) for name in saved if name in known})
        own = self._shapes
        if (weights := state.get("weights", own)) != own:
            raise ValueError(f"This state holds feedback for weights of {weights}, this network has {own}.")
        self.feedback = {name: matrix.detach().clone() for name, matrix in saved.items()}
        self._drawn.clear()


_PREFIX = "feedback."


def _named(feedback: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_PREFIX + name: tensor for name, tensor in feedback.items()}


def _unnamed(credit: Credit, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if unknown := [name for name in saved if not name.startswith(_PREFIX)]:
        raise ValueError(f"This state has {', '.join(unknown)}, which {type(credit).__name__} does not know.")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items()}


def _head(stage: Stage) -> BlockStage | None:
    """Return what a stage without closed forms does before its first parameter, as a stage of its own."""
    if not isinstance(stage, BlockStage):
        return None
    named = zip(stage.names, stage.modules, strict=True)
    head = list(takewhile(lambda each: not list(each[1].parameters()), named))
    return BlockStage(stage.name, head) if head else None


def _never_crossed(stage: Stage) -> set[nn.Parameter]:
    """Return the weights of a stage that scale, shift or are looked up: no delta goes down through them."""
    leaves = [m for module in stage.modules for m in module.modules()]
    return {p for m in leaves if isinstance(m, _NO_MAPS) for p in m.parameters(recurse=False)}


def _met_by_data_alone(stage: Stage) -> set[nn.Parameter]:
    """Return the weights of the first stage's first layer, where it is known that they meet the network's input alone."""
    first: Any = next(m for m in stage.modules if list(m.parameters()))
    if isinstance(first, Recurrent) and type(first.cell) in _CELLS:
        return {first.cell.weight_ih}
    own = set(first.parameters())
    is_shared = sum(not own.isdisjoint(m.parameters()) for m in stage.modules) > 1
    return own if type(first).forward in _LAYERS and not is_shared else set()


def _generator(seed: int, index: int) -> torch.Generator:
    # One for each stage, so that none's feedback depends on how many numbers the others took.
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2**63)


def _normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    # In float32 on the CPU whatever the weights are: the same numbers for every dtype and device.
    return torch.randn(shape, generator=generator) * std


def _size(weight: Tensor) -> float:
    """Return the root mean square of a weight, or `1 / sqrt(fan-in)` where it is 0."""
    size = float(weight.detach().double().square().mean().sqrt())
    return size if size > 0 else weight[0].numel() ** -0.5


def _check_saved(saved: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != wanted:
        raise ValueError(f"This state holds feedback of shapes {shapes}, this network takes {wanted}.")
