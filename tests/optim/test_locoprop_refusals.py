"""Bad input to LocoProp and AffineProjection is refused by name, or made the best of; either way nothing is half done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Branch, blobs, descend, equal, mixed, mlp, state
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam

from beyondprop import AffineProjection, LocoProp, NonFiniteError, UnsupportedModelError

CE = nn.CrossEntropyLoss()
both = pytest.mark.parametrize("kind", [LocoProp, AffineProjection])


def _hooks(model: nn.Module) -> list[Any]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


class Bare(nn.Module):
    """Whatever modules; `forward` is not called."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def _shared(other: nn.Module, attribute: str) -> nn.Module:
    first = nn.Linear(4, 4)
    setattr(other, attribute, first.weight)
    return Bare(first=first, other=other)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "list": (lambda: [nn.Linear(2, 2)], {}, TypeError, "model must be a torch.nn.Module, got list"),
    "parameters": (nn.Linear(2, 2).parameters, {}, TypeError, "model must be a torch.nn.Module, got generator"),
    "no_layers": (lambda: nn.Sequential(nn.LayerNorm(4)), {}, ValueError, "no trainable Linear, Conv or Embedding"),
    "frozen": (lambda: mlp(6, 5, 3).requires_grad_(False), {}, ValueError, "no trainable Linear, Conv or Embedding"),
    "all_excluded": (lambda: mlp(6, 5, 3), {"exclude": ["*"]}, ValueError, r"to capture besides exclude=\['\*'\]"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), {}, UnsupportedModelError, "'0' is lazy: run one batch"),
    "complex": (
        lambda: Bare(a=nn.Linear(2, 2), b=nn.Linear(2, 2, dtype=torch.complex64)),
        {},
        UnsupportedModelError,
        r"'b' has a weight of torch.complex64; a real .* Pass exclude=\['b'\]",
    ),
    "sparse": (
        lambda: Bare(a=nn.Embedding(4, 2, sparse=True)),
        {},
        UnsupportedModelError,
        r"'a' is an Embedding with sparse, .* Pass exclude=\['a'\]",
    ),
    "max_norm": (
        lambda: Bare(a=nn.Embedding(4, 2, max_norm=1.0)),
        {},
        UnsupportedModelError,
        "Embedding with max_norm",
    ),
    "by_freq": (
        lambda: Bare(a=nn.Embedding(4, 2, scale_grad_by_freq=True)),
        {},
        UnsupportedModelError,
        "Embedding with scale_grad_by_freq",
    ),
    "shared_outside": (
        lambda: _shared(Scale(), "weight"),
        {},
        UnsupportedModelError,
        r"'first' shares a parameter with 'other.weight', which is not captured.*exclude=\['first'\]",
    ),
    "shared_excluded": (
        lambda: _shared(nn.Linear(4, 4), "weight"),
        {"exclude": ["other"]},
        UnsupportedModelError,
        "'first' shares a parameter with 'other.weight'",
    ),
    "unknown": (
        lambda: mlp(6, 5, 3),
        {"exclude": ["head.*"]},
        ValueError,
        r"exclude has 'head.\*', which fits no module",
    ),
}


@both
@pytest.mark.parametrize("case", list(MODELS))
def test_models(kind: Any, case: str) -> None:
    make, settings, error, message = MODELS[case]
    model = make()
    before = _hooks(model) if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message):
        kind(model, **settings)
    assert not isinstance(model, nn.Module) or _hooks(model) == before


@pytest.mark.parametrize(
    "second", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)], ids=["other_bias", "conv", "embedding"]
)
def test_a_projection_has_one_system_for_a_shared_weight(second: Any) -> None:
    first: Any = nn.Linear(4, 4)
    if isinstance(second, nn.Conv1d):
        first.weight = nn.Parameter(torch.randn(4, 4, 1))
    second.weight = first.weight
    model = Bare(first=first, second=second)
    with pytest.raises(UnsupportedModelError, match=r"'first\+second' share .* Pass exclude=\['first', 'second'\]"):
        AffineProjection(model)
    assert not _hooks(model)
    AffineProjection(Bare(model=model, more=nn.Linear(2, 2)), exclude=["model.first", "model.second"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.words.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(t)))


def test_a_tied_embedding_has_one_local_problem() -> None:
    model = Tied()
    optimizer = LocoProp(model, lr=1e-3)
    assert [group["name"] for group in optimizer.param_groups] == ["words+out"]
    t = torch.arange(20) % 5
    losses = descend(model, optimizer, t, (t + 1) % 5, 30)
    assert losses[-1] < 0.7 * losses[0]


LOCO: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
    ({"target_lr": 0}, ValueError, "target_lr must be a finite number > 0, got 0"),
    ({"target_lr": float("nan")}, ValueError, "target_lr must be a finite number > 0, got nan"),
    ({"local_steps": 0}, ValueError, "local_steps must be an integer >= 1, got 0"),
    ({"local_steps": 2.5}, ValueError, "local_steps must be an integer >= 1, got 2.5"),
    ({"local_steps": True}, ValueError, "local_steps must be an integer >= 1, got True"),
    ({"loss": "bregman"}, ValueError, "loss must be one of 'matching', 'squared', 'quadratic', got 'bregman'"),
    *(({"rows": rows}, ValueError, "rows must be a share.*got") for rows in (0, -3, 0.0, 1.5, float("nan"), True, "1")),
    ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
    ({"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\), got -0.1"),
    ({"alpha": 1.0}, ValueError, r"alpha must be in \[0, 1\), got 1.0"),
    ({"eps": 0.0}, ValueError, "eps must be a finite number > 0, got 0.0"),
    ({"prox": -1.0}, ValueError, "prox must be a finite number >= 0, got -1.0"),
    ({"trust": 0.0}, ValueError, "trust must be a finite number > 0, got 0.0"),
    ({"local_schedule": "cosine"}, ValueError, "local_schedule must be one of 'linear', 'constant', got 'cosine'"),
    ({"transfer": {"0": "swish"}}, ValueError, "transfer must be one of 'identity', 'relu'.*got 'swish'"),
    (
        {"transfer": {"9": "relu"}},
        ValueError,
        r"transfer has '9', which fits no captured layer; these are \['0', '2'\]",
    ),
    ({"layers": {"1": {}}}, ValueError, r"layers has '1', which fits no captured layer; these are \['0', '2'\]"),
    ({"layers": {"0": {"momentum": 0.5}}}, ValueError, "layers must be one of 'lr', 'target_lr'.*got 'momentum'"),
    ({"layers": {"0": {"local_steps": 0}}}, ValueError, "local_steps must be an integer >= 1, got 0"),
    ({"local_optimizer": "sgd"}, TypeError, "local_optimizer must be callable with parameters and lr=, got str"),
    ({"local_optimizer": lambda p, lr: None}, TypeError, "local_optimizer must return a torch optimizer.*got NoneType"),
    ({"local_optimizer": torch.optim.LBFGS}, TypeError, "whose step takes no closure, got LBFGS"),
]
AFFINE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"damping": -1.0}, ValueError, "damping must be a finite number >= 0, got -1.0"),
    ({"damping": float("inf")}, ValueError, "damping must be a finite number >= 0, got inf"),
    ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
    ({"side": "rows"}, ValueError, "side must be one of 'smaller', 'inputs', 'samples', got 'rows'"),
    *(({"forgetting": f}, ValueError, r"forgetting must be in \(0, 1\], got") for f in (0.0, 1.5, "1", float("nan"))),
    ({"refresh": 0}, ValueError, "refresh must be an integer >= 1, got 0"),
    ({"refresh": 2}, ValueError, "refresh=2 needs a running .*pass forgetting < 1"),
    ({"side": "samples", "forgetting": 0.5}, ValueError, "side='samples' has no running"),
    ({"rows": 0}, ValueError, "rows must be a share.*got 0"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"), [(LocoProp, *c) for c in LOCO] + [(AffineProjection, *c) for c in AFFINE]
)
def test_arguments(kind: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp(6, 5, 3)
    with pytest.raises(error, match=message):
        kind(model, **settings)
    assert not _hooks(model)


def test_groups_are_the_models() -> None:
    model = mlp(6, 5, 3)
    optimizer = LocoProp(model)
    with pytest.raises(TypeError, match="LocoProp takes its parameters from its model; build a new one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 2


class Own(nn.Linear):
    """A subclass that may do anything with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.tanh(), self.bias)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unsqueeze(1))[0].squeeze(1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unsqueeze(0), x.unsqueeze(0), x.unsqueeze(0))[0].squeeze(0)


UNCAPTURED: dict[str, Callable[[], nn.Module]] = {
    "lstm": Recurrent,
    "attention": Attending,
    "subclass": lambda: Own(6, 6),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "spectral_norm_by_hook": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "transposed": lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.ConvTranspose1d(6, 6, 1), nn.Flatten()),
    "bilinear": lambda: nn.Sequential(nn.LayerNorm(6), nn.PReLU(6)),
}


@pytest.mark.filterwarnings("ignore:.*of the trainable weights are in no layer")
@pytest.mark.parametrize("part", list(UNCAPTURED))
def test_what_has_no_local_problem_is_the_base_optimizers(part: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), UNCAPTURED[part](), nn.Linear(6, 3))
    twin = copy.deepcopy(model)
    x, y = blobs(12)
    optimizer = LocoProp(model, lr=0.0, local_optimizer=SGD, base=partial(Adam, lr=0.01))
    plain, projection = Adam(twin[1].parameters(), lr=0.01), AffineProjection(twin)
    assert [group["name"] for group in optimizer.param_groups] == ["0", "2", "base"]
    for _ in range(2):
        CE(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        CE(twin(x), y).backward()
        projection.step()
        plain.step()
        twin.zero_grad()
    assert equal(state(model), state(twin))


def _refuses(model: nn.Module, run: LocoProp | AffineProjection, error: type[Exception], message: str) -> None:
    before = copy.deepcopy((state(model), [p.grad for p in model.parameters()], run.state_dict()))
    with pytest.raises(error, match=message):
        run.step()
    assert equal(before, (state(model), [p.grad for p in model.parameters()], run.state_dict()))


def _built(kind: Any, model: nn.Module) -> Any:
    return LocoProp(model, base=partial(SGD, lr=0.1)) if kind is LocoProp else kind(model, forgetting=0.5)


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "gradient", "base_gradient"])
def test_what_is_not_finite(kind: Any, value: float, where: str) -> None:
    model = mixed(dropout=0.0)
    run = _built(kind, model)
    x, y = blobs(12)
    for bad in (False, True, False):
        model.zero_grad()
        CE(model(torch.full_like(x, value) if bad and where == "input" else x), y).backward()
        if not bad:
            run.step()
            continue
        if where != "input":
            p = model.get_submodule("3" if where == "gradient" else "1").weight
            assert isinstance(p, Tensor)
            assert p.grad is not None
            p.grad.view(-1)[2] = value
        name = {"input": "0", "gradient": "3", "base_gradient": "1.weight"}[where]
        _refuses(model, run, NonFiniteError, f"The gradient of '{name}' is not finite. No weight was changed")
        model.load_state_dict({
            n: b.nan_to_num(0, 1, 0) for n, b in model.state_dict().items()
        })  # BatchNorm's statistics


class Direct(nn.Module):
    """Uses a weight without calling its layer."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(3, 6))
        self.sparse = sparse

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.embedding(torch.arange(len(x)) % 3, self.table, sparse=self.sparse)
        return F.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias)


@both
def test_a_weight_used_without_its_layer(kind: Any) -> None:
    model = Direct()
    x, y = blobs(12)
    run = _built(kind, model)
    CE(model(x), y).backward()
    _refuses(model, run, UnsupportedModelError, r"'b' has a gradient, but none of .*exclude=\['b'\]")
    run.remove_hooks()
    run = kind(model, exclude=["b"])
    model.zero_grad()
    CE(model(x), y).backward()
    before = state(model)
    run.step()
    assert (kind is LocoProp) == (not torch.equal(before["b.weight"], model.b.weight))


def test_a_sparse_gradient() -> None:
    model = nn.Sequential(Direct(sparse=True))
    model[0].b = nn.Linear(6, 3)
    run = LocoProp(model, exclude=["0.b"])
    CE(model(blobs(12)[0]), blobs(12)[1]).backward()
    before = (state(model), copy.deepcopy(run.state_dict()))
    with pytest.raises(
        UnsupportedModelError, match=r"The gradient of '0.table' is sparse; Adam, the base optimizer, takes dense ones"
    ):
        run.step()
    assert equal(before, (state(model), run.state_dict()))


@both
def test_a_second_step_has_nothing_to_go_by(kind: Any) -> None:
    model = mixed(dropout=0.0)
    run = _built(kind, model)
    run.step()  # before any backward pass: nothing to do
    descend(model, run, *blobs(12), steps=1)
    _refuses(model, run, UnsupportedModelError, "'0' has a gradient, but none of its forward calls was captured since")
    model.zero_grad()
    before = copy.deepcopy((state(model), run.state_dict()))
    run.step()
    assert equal(before, (state(model), run.state_dict()))


@both
def test_a_layer_that_this_pass_did_not_use_stays(kind: Any) -> None:
    model = Branch()
    run = _built(kind, model)
    for way, other in (("left", "right"), ("right", "left"), ("left", "right")):
        before = state(model)
        model.way = way
        descend(model, run, *blobs(12), steps=1)
        moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        assert moved == {"inner", way}
        assert other not in moved


def _diverging(**settings: Any) -> tuple[nn.Module, LocoProp]:
    model = mlp(6, 8, 5, 3, activation="tanh")
    settings = {"loss": "squared", "local_optimizer": partial(SGD, momentum=0.9), **settings}
    return model, LocoProp(model, lr=1e-3, **settings)


def test_local_steps_that_diverge_leave_their_layer_as_it_was() -> None:
    model, optimizer = _diverging(layers={"2": {"lr": 1e30}})
    x, y = blobs(12)
    CE(model(x), y).backward()
    before = state(model)
    message = "The local steps of '2' were not finite: these layers keep their weights .* Lower lr or target_lr, or set"
    with pytest.warns(UserWarning, match=message):
        optimizer.step()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {"0", "4"}
    assert {p for p in optimizer.state if optimizer.state[p]} == {*model[0].parameters(), *model[4].parameters()}  # type: ignore[index]
    optimizer.param_groups[1]["lr"] = 1e-3
    losses = descend(model, optimizer, x, y, 30)
    assert losses[-1] < 0.5 * losses[0]


def test_a_bound_on_the_change_keeps_divergence_small() -> None:
    model, optimizer = _diverging(layers={"2": {"lr": 10.0}}, trust=0.01)
    before = state(model)
    descend(model, optimizer, *blobs(12), steps=1)
    for name in ("0", "2", "4"):
        old = torch.cat([before[f"{name}.{p}"].flatten() for p in ("weight", "bias")])
        new = torch.cat([p.detach().flatten() for p in model.get_submodule(name).parameters()])
        assert 0 < float((new - old).norm()) < 0.01 * float(old.norm()) * (1 + 1e-5)
