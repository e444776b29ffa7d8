"""Weights that are used besides their layers' own calls: refused by name, however; what is no such use is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import blobs, difference, mlp, state
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from beyondprop import AffineProjection, LocoProp, UnsupportedModelError

D = torch.float64
X, Y = blobs(12, dtype=D)
CE = nn.CrossEntropyLoss()
Run = LocoProp | AffineProjection
RUNS: dict[str, Callable[..., Run]] = {
    "matching": partial(LocoProp, lr=1e-3, local_optimizer=SGD),
    "squared": partial(LocoProp, lr=1e-3, local_optimizer=SGD, loss="squared"),
    "smaller": AffineProjection,
    "inputs": partial(AffineProjection, side="inputs"),
    "running": partial(AffineProjection, forgetting=0.5),
}
every_run = pytest.mark.parametrize("kind", list(RUNS))


class Language(nn.Module):
    """Tokens in, scores of tokens out, by the weight of the embedding itself or by a module that shares it."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        else:
            del self.head

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.embedding(tokens)))
        return self.head(h) if hasattr(self, "head") else F.linear(h, self.embedding.weight)


TOKENS = torch.arange(10).view(2, 5) % 7


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(6, 8, 5, 3, activation="tanh").double()


def _autoencoder(model: nn.Module) -> Tensor:
    first: Any = model[0]  # type: ignore[index]
    return CE(model(X), Y) + F.mse_loss(torch.tanh(first(X)) @ first.weight, X)


USES: dict[str, tuple[str, Callable[[nn.Module], Tensor]]] = {
    "transposed": ("0", _autoencoder),
    "penalty": ("2", lambda m: CE(m(X), Y) + 0.01 * m.get_parameter("2.weight").square().sum()),
    "penalty on a bias": ("2", lambda m: CE(m(X), Y) + m.get_parameter("2.bias").abs().sum()),
    "a part": ("4", lambda m: CE(m(X), Y) + m.get_parameter("4.weight")[0].norm()),
    "function": ("2", lambda m: CE(m(X), Y) + F.linear(X[:, :5], m.get_parameter("2.weight").t()).mean()),
    "past the hooks": ("2", lambda m: CE(m(X), Y) + m[2].forward(m[0](X)).mean()),  # type: ignore[index, operator]
}


@every_run
@pytest.mark.parametrize("name", USES)
def test_a_weight_that_is_used_directly_is_refused_by_name(kind: str, name: str) -> None:
    layer, loss = USES[name]
    model = _net()
    run = RUNS[kind](model)
    loss(model).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None], state(model)
    with pytest.raises(UnsupportedModelError, match=rf"layer '{layer}' is used besides .* exclude=\['{layer}'\]"):
        run.step()
    assert not difference([p.grad for p in model.parameters()], before[0])  # type: ignore[misc]
    assert not difference(state(model).values(), before[1].values())
    model.zero_grad()
    CE(model(X), Y).backward()  # and nothing of it is left
    run.step()
    run.remove_hooks()
    run = RUNS[kind](model, exclude=[layer])  # the way out
    model.zero_grad()
    loss(model).backward()
    run.step()


@every_run
def test_an_embedding_whose_weight_makes_the_scores(kind: str) -> None:
    model = Language()
    run = RUNS[kind](model)
    CE(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    with pytest.raises(UnsupportedModelError, match=r"'embedding' is used besides .*tie the weights of two modules"):
        run.step(samples=10) if isinstance(run, AffineProjection) else run.step()


@every_run
def test_a_cast_weight_that_two_share_is_refused_too(kind: str) -> None:
    model = _net().float()
    run = RUNS[kind](model)
    with torch.autocast("cpu", torch.bfloat16):
        x = X.float()
        first: Any = model[0]
        (CE(model(x), Y) + (torch.tanh(first(x)) @ first.weight).square().mean()).backward()
    with pytest.raises(UnsupportedModelError, match="layer '0' is used besides"):
        run.step(samples=12) if isinstance(run, AffineProjection) else run.step()


@every_run
def test_a_refused_use_is_forgotten_in_the_last_pass_that_is_looked_at_too(kind: str) -> None:
    model = _net()
    run = RUNS[kind](model)
    for number in range(1, 11):
        model.zero_grad()
        if number in (2, 8):
            USES["penalty"][1](model).backward()
            with pytest.raises(UnsupportedModelError, match="is used besides"):
                run.step()
        else:
            _backward(model, run)
            run.step()


def _backward(model: nn.Module, run: Run) -> None:
    CE(model(X), Y).backward()


def _decayed(model: nn.Module, run: Run) -> None:
    _backward(model, run)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if getattr(run, "side", "inputs") == "inputs":  # what solves over samples has always refused it
        for p in model.parameters():
            assert p.grad is not None
            p.grad.add_(p.detach(), alpha=0.1).mul_(0.5)
        sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]


def _thrown_away(model: nn.Module, run: Run) -> None:
    USES["penalty"][1](model).backward()
    model.zero_grad()
    _backward(model, run)


def _only_looked(model: nn.Module, run: Run) -> None:
    torch.autograd.grad(USES["penalty"][1](model), list(model.parameters()))
    _backward(model, run)


def _several(model: nn.Module, run: Run) -> None:
    output = model(X)
    CE(output, Y).backward(retain_graph=True)
    (output.square().mean() + CE(model(2 * X), Y)).backward()


def _without_a_part(model: nn.Module, run: Run) -> None:
    class Drops(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return a + b

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
            return gradient, None

    CE(Drops.apply(model(X), model(X + 1)), Y).backward()  # type: ignore[no-untyped-call]


def _some(model: nn.Module, run: Run) -> None:
    CE(model(X), Y).backward(inputs=[p for p in model[2:].parameters()])  # type: ignore[index]


def _halves(model: nn.Module, run: Run) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X.float()) + model(-X.float())  # one cast of every weight serves both
        CE(output, Y).backward()


ORDINARY = [_backward, _decayed, _thrown_away, _only_looked, _several, _without_a_part, _some, _halves]


@every_run
@pytest.mark.parametrize("passes", ORDINARY, ids=lambda f: f.__name__)
def test_what_is_no_such_use_is_not_refused(kind: str, passes: Callable[[nn.Module, Run], Any]) -> None:
    model = _net().float() if passes is _halves else _net()
    run = RUNS[kind](model)
    passes(model, run)
    if passes in (_several, _without_a_part, _halves) and isinstance(run, AffineProjection):
        run.step(samples=24)
    else:
        run.step()


@pytest.mark.parametrize("reentrant", [True, False])
def test_tied_repeated_and_checkpointed_layers_are_not_refused(reentrant: bool) -> None:
    model = Language(tied=True)
    optimizer = LocoProp(model)
    for _ in range(2):
        inner: Any = checkpoint(model.inner, model.embedding(TOKENS), use_reentrant=reentrant)
        scores = model.head(torch.tanh(model.inner(inner)))
        CE(scores.flatten(0, 1), TOKENS.flatten()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what follows a reentrant checkpoint
            optimizer.step()
        optimizer.zero_grad()
