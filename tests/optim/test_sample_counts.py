"""Over how many samples a loss averages: given, taken from the first dimension, or refused where that is doubtful."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import difference, mlp, projected
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beyondprop import AffineProjection, Backprop, LocoProp, UnsupportedModelError
from beyondprop.optim._local import _looked_at
from beyondprop.optim._units import Call

D = torch.float64
N, T = 8, 4  # a multiple, so that row counts alone do not tell them apart
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, T, 6, dtype=D, generator=GENERATOR)
Y = torch.arange(N) % 3
TOKENS = torch.arange(N * T).view(N, T) % 5


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(1))


class Reader(nn.Module):
    """A layer, something that mixes time steps, their mean, a head."""

    def __init__(self, mixer: str, *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.time, self.inner = int(batch_first), nn.Linear(6, 8)
        kinds: dict[str, Callable[..., nn.Module]] = {
            "encoder": partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0),
            "attention": partial(nn.MultiheadAttention, 8, 2),
            "lstm": partial(nn.LSTM, 8, 8),
            "gru": partial(nn.GRU, 8, 8),
            "rnn": partial(nn.RNN, 8, 8),
            "none": lambda batch_first: nn.Identity(),
        }
        self.mixer = kinds[mixer](batch_first=batch_first)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = self.mixer(h, h, h, need_weights=False) if isinstance(self.mixer, nn.MultiheadAttention) else self.mixer(h)
        h = h[0] if isinstance(h, tuple) else h
        return self.head(h.mean(self.time))


MIXERS = ["encoder", "attention", "lstm", "gru", "rnn"]


@pytest.mark.parametrize("mixer", [*MIXERS, "none"])
def test_sequence_first_is_batch_first_where_the_samples_are_given(mixer: str) -> None:
    one, other = Reader(mixer, batch_first=True), Reader(mixer, batch_first=False)
    wanted = projected(one, lambda: F.cross_entropy(one(X), Y))
    found = projected(other, lambda: F.cross_entropy(other(X.transpose(0, 1)), Y), samples=N)
    assert max(map(difference, found, wanted)) < 1e-12


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("steps", [T, T + 1], ids=["divides", "does not divide"])
def test_sequence_first_is_refused_by_name(mixer: str, steps: int) -> None:
    model = Reader(mixer, batch_first=False)
    x = rand(steps, N, 6)
    before: list[Tensor] = []

    def loss() -> Tensor:
        value = F.cross_entropy(model(x), Y)
        before.extend(torch.autograd.grad(value, list(model.parameters()), retain_graph=True))
        return value

    with pytest.raises(UnsupportedModelError, match=rf"called with {steps} and .*step\(samples=.*reduction='sum'"):
        projected(model, loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None)


def test_the_root_itself_may_be_recurrent() -> None:
    class Root(nn.LSTM):
        def __init__(self) -> None:
            super().__init__(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(super().forward(x)[0])

    model = Root().double()
    with pytest.raises(UnsupportedModelError, match=r"Root with batch_first=False takes \(4, 8, 6\)"):
        projected(model, lambda: F.cross_entropy(model(X.transpose(0, 1)).flatten(0, 1), Y.repeat(T)))


class Packed(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.batch_first, self.lstm, self.head = batch_first, nn.LSTM(6, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=self.batch_first)
        return self.head(self.lstm(packed)[1][0][0])


def test_packed_sequences_know_their_number() -> None:
    lengths = torch.tensor([3, 3, 2, 2, 2, 1, 1, 1])
    one, other, x = Packed(batch_first=True), Packed(batch_first=False), X[:, :3]
    wanted = projected(one, lambda: F.cross_entropy(one(x, lengths), Y))
    with pytest.raises(
        UnsupportedModelError, match=r"called with 3 and .*(takes 8 packed sequences|output has the shape)"
    ):
        projected(other, lambda: F.cross_entropy(other(x.transpose(0, 1), lengths), Y))
    other.zero_grad()
    found = projected(other, lambda: F.cross_entropy(other(x.transpose(0, 1), lengths), Y), samples=N)
    assert max(map(difference, found, wanted)) < 1e-12


def test_packed_sequences_that_give_every_step_are_refused_by_name() -> None:
    lstm, head = nn.LSTM(6, 5).double(), nn.Linear(5, 3).double()

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = lstm, head

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((N,), 3))
            return self.head(nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0])

    model = Tagger()
    with pytest.raises(UnsupportedModelError, match="called with 3 and a LSTM takes 8 packed sequences"):
        projected(model, lambda: F.cross_entropy(model(X[:, :3].transpose(0, 1)).flatten(0, 1), Y.repeat(3)))


def test_a_sample_without_a_batch_is_refused_by_name() -> None:
    model = mlp(6, 5, 4).double()
    with pytest.raises(UnsupportedModelError, match=r"called with 6 and its output has the shape \(4,\)"):
        projected(model, lambda: model(X[0, 0]).square().mean())
    projected(model, lambda: model(X[0, 0]).square().mean(), samples=1)


def test_layers_called_one_by_one_with_unlike_lengths_are_refused_by_name() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(5, 6), "places": nn.Embedding(T, 6), "head": nn.Linear(6, 3)}).double()

    def loss() -> Tensor:
        h = model["words"](TOKENS) + model["places"](torch.arange(T))
        return F.cross_entropy(model["head"](h.mean(1)), Y)

    with pytest.raises(UnsupportedModelError, match=r"not called as a whole, its layers with \[4, 8\]"):
        projected(model, loss)
    projected(model, loss, samples=N)
    projection = AffineProjection(model, reduction="sum")
    loss().backward()
    projection.step()


class Words(nn.Module):
    """Tokens `(N, T)` to logits: as they are, in rows, or in a dict behind a loss of its own."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.form, self.words, self.places = form, nn.Embedding(5, 8), nn.Embedding(T, 8)
        self.mixer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)  # time first inside
        self.head = nn.Linear(8, 5)
        self.double()

    def forward(self, tokens: Tensor) -> Any:
        h = (self.words(tokens) + self.places(torch.arange(T))).transpose(0, 1)
        z = self.head(self.mixer(h).transpose(0, 1))
        if self.form == "rows":
            return z.flatten(0, 1)
        if self.form == "dict":
            return {"loss": F.cross_entropy(z[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), "logits": z}
        return z


class Windows(nn.Module):
    """Images cut into windows, which a layer takes for samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.mixer, self.head = (
            nn.Linear(6, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).view(N * 2, T // 2, 8)
        return self.head(self.mixer(h, h, h)[0].reshape(N, T, 8).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        self.rest = Reader("lstm", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(checkpoint(self.block, x, use_reentrant=self.use_reentrant))


def checkpointed(use_reentrant: bool) -> list[Tensor]:
    net = Checkpointed(use_reentrant)
    return projected(net, lambda: F.cross_entropy(net(X.clone().requires_grad_()), Y))


def words(form: str, loss: Callable[[Any], Tensor]) -> Callable[[], list[Tensor]]:
    model = Words(form)
    return lambda: projected(model, lambda: loss(model(TOKENS)))


FREE = nn.Parameter(torch.ones(5, 6, dtype=torch.float64))  # which no layer has


def plain(loss: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
    model = mlp(6, 5, 3).double()
    return lambda: projected(model, lambda: loss(model, X[:, 0]))


def several() -> list[Tensor]:
    model = mlp(6, 5, 3).double()
    projection = AffineProjection(model)
    for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):  # the last batch is short
        (F.cross_entropy(model(X[rows, 0]), Y[rows]) / 3).backward()
    projection.step()
    return []


def frozen() -> list[Tensor]:
    model = Reader("lstm", batch_first=True)
    model.inner.requires_grad_(False)
    return projected(model, lambda: F.cross_entropy(model(X), Y))


def halves() -> list[Tensor]:
    model = mlp(6, 5, 3)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(X[:, 0].float()), Y)

    return projected(model, loss)


IGNORED = torch.where(TOKENS > 2, -100, TOKENS)
SOFT = F.one_hot(Y, 3).double()
ORDINARY: dict[str, Callable[[], object]] = {
    "language model, mean over tokens": words("plain", lambda z: F.cross_entropy(z.transpose(1, 2), TOKENS)),
    "language model in rows": words("rows", lambda z: F.cross_entropy(z, TOKENS.flatten())),
    "ignored tokens": words("rows", lambda z: F.cross_entropy(z, IGNORED.flatten())),
    "a dict with a loss first": words("dict", lambda found: found["loss"]),
    "windows as samples": lambda: projected(net := Windows(), lambda: F.cross_entropy(net(X), Y)),
    "segmentation": lambda: projected(
        net := nn.Conv2d(2, 3, 3, padding=1).double(),
        lambda: F.cross_entropy(net(rand(N, 2, 5, 5)), torch.arange(N * 25).view(N, 5, 5) % 3),
    ),
    "pooled images": lambda: projected(
        net := nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double(),
        lambda: F.l1_loss(net(rand(N, 2, 5, 5)), rand(N, 3)),
    ),
    "reentrant checkpoint": partial(checkpointed, True),
    "checkpoint": partial(checkpointed, False),
    "accumulation and a short batch": several,
    "frozen parts": frozen,
    "autocast": halves,
    "label smoothing": plain(lambda m, x: F.cross_entropy(m(x), Y, label_smoothing=0.1)),
    "soft labels and a penalty": plain(lambda m, x: F.cross_entropy(m(x), SOFT) + 0.1 * FREE.abs().mean()),
    "a penalty beside a criterion": plain(lambda m, x: F.cross_entropy(m(x), Y) + 0.1 * FREE.abs().mean()),
    "a penalty beside a mean": plain(lambda m, x: (m(x) - SOFT).square().mean() + 0.1 * FREE.abs().mean()),
    "mean over samples, then over outputs": plain(lambda m, x: (m(x) - SOFT).square().mean(0).mean()),
    "stacked losses": plain(lambda m, x: torch.stack([F.cross_entropy(m(x), Y), m(x).square().mean()]).mean()),
    "two views": plain(lambda m, x: F.cosine_embedding_loss(m(x), m(x + 1), torch.ones(N))),
    "labelled and unlabelled": plain(lambda m, x: F.cross_entropy(m(x[:3]), Y[:3]) + m(x[3:]).square().mean()),
    "mixed labels": plain(lambda m, x: 0.3 * F.cross_entropy(m(x), Y) + 0.7 * F.cross_entropy(m(x), Y.flip(0))),
    "a scale that is learned": plain(lambda m, x: F.cross_entropy(m(x), Y) * (s := FREE[0, 0]).exp() - s),
    "a masked mean": plain(lambda m, x: (m(x) * SOFT).sum() / SOFT.sum()),
    "one sample": lambda: projected(net := Reader("gru", batch_first=True), lambda: F.cross_entropy(net(X[:1]), Y[:1])),
    "as long as there are samples": lambda: projected(
        net := Reader("gru", batch_first=False), lambda: F.cross_entropy(net(rand(N, N, 6)), Y)
    ),
    "layers called one by one": lambda: projected(
        net := mlp(6, 5, 3).double(), lambda: F.cross_entropy(net[2](net[1](net[0](X[:, 0]))), Y)
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_ordinary_is_not_refused(name: str) -> None:
    ORDINARY[name]()


@pytest.mark.parametrize("settings", [{}, {"side": "inputs"}, {"forgetting": 0.5}, {"rows": 3}])
def test_given_samples_are_the_factor_of_the_gradients(settings: dict[str, Any]) -> None:
    found = {}
    for samples in (None, N, 2 * N):
        torch.manual_seed(0)
        model = mlp(6, 5, 3).double()
        projection = AffineProjection(model, **settings)
        F.cross_entropy(model(X[:, 0]), Y).backward()
        projection.step(samples)
        found[samples] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, found[None], found[N]))
    assert max(difference(a, 2 * b) for a, b in zip(found[2 * N], found[N], strict=True)) < 1e-12


def test_a_sum_is_taken_as_it_is() -> None:
    model = Reader("lstm", batch_first=False)
    projection = AffineProjection(model, reduction="sum")
    F.cross_entropy(model(X.transpose(0, 1)), Y, reduction="sum").backward()
    projection.step()


@pytest.mark.parametrize("samples", [0, -3, float("nan"), float("inf"), True, "8", torch.tensor(8)])
def test_samples_are_a_number_above_0(samples: Any) -> None:
    projection = AffineProjection(mlp(6, 5, 3))
    with pytest.raises(ValueError, match="samples must be a finite number > 0"):
        projection.step(samples)


def test_what_only_looks_says_nothing_of_the_samples() -> None:
    model = mlp(6, 5, 3).double()
    projection = AffineProjection(model)
    x = X[:, 0].clone().requires_grad_()
    output = model(x)
    output[0, 0].square().mean().backward(inputs=[x], retain_graph=True)
    F.cross_entropy(output, Y).backward()
    projection.step()


def test_backprop_hands_on_batches_whose_samples_come_first() -> None:
    class Inner(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1))

    wanted, found = Reader("encoder", batch_first=True), Inner("encoder", batch_first=False)
    for model in (wanted, found):
        rule = Backprop(
            model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), preconditioner=AffineProjection(model)
        )
        rule.step(X, Y)
    assert max(map(difference, found.parameters(), wanted.parameters())) < 1e-12


def test_samples_of_an_unbatched_convolution_are_not_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def looked_at(calls: list[Call], rows: float | int) -> float:
        seen.append(_looked_at(calls, rows))
        return seen[-1]

    monkeypatch.setattr("beyondprop.optim._local._looked_at", looked_at)
    for shape in ((4, 5, 5), (1, 4, 5, 5)):
        model = nn.Conv2d(4, 3, 2).double()
        optimizer = LocoProp(model, loss="squared", rows=2)
        model(rand(*shape)).square().sum().backward()
        optimizer.step()
    assert seen == [16.0, 16.0]
