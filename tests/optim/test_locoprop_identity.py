"""LocoProp with one local step is backpropagation; with several it is a second implementation from the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Attention, Residual, convnet, difference, mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from beyondprop import LocoProp
from beyondprop.optim._capture import Capture
from beyondprop.optim.rmsprop import RMSProp

D = torch.float64
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
LABELS = torch.arange(9) % 3


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x)))


class _Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(6, 8), Residual(8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(6, 5), nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(torch.tanh(self.embed(x)))[0][:, -1])


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same", bias=False), nn.Sigmoid()),
        *(nn.Conv2d(6, 6, 2, groups=6, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(150, 3)),
    )


def _partly_frozen() -> nn.Sequential:
    model = mlp(6, 7, 7, 7, 3, activation="sigmoid")
    for p in (model[0].weight, model[2].bias, *model[4].parameters()):
        assert isinstance(p, nn.Parameter)
        p.requires_grad_(False)
    return model


def _labels(out: Tensor) -> Tensor:
    return F.cross_entropy(out, LABELS)


def _tokens(out: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), torch.arange(out.shape[0] * out.shape[1]) % out.shape[2])


def _stack(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 3))


def _encoder() -> nn.Module:
    return _stack(Attention(8, fused=True), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True))


_BLOCK = "first block.inner.0 block.inner.2 head"
# Name: model, shape of its input, loss, layers that are captured.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor], Tensor], str]] = {
    "mlp": (partial(mlp, 6, 7, 5, 3), (9, 6), _labels, "0 2 4"),
    "cnn": (_cnn, (9, 1, 8, 8), _labels, "0 2 4 7"),
    "norm": (partial(convnet, norm=True), (9, 1, 8, 8), _labels, "0 4 7 9"),
    "residual": (lambda: _stack(Residual(8)), (9, 6), _labels, "0 1.inner.0 1.inner.2 2"),
    "attention": (lambda: _stack(_SelfAttention(8), nn.LayerNorm(8)), (3, 4, 6), _tokens, "0 1.q 1.k 1.v 1.out 3"),
    "transformer": (_encoder, (3, 4, 6), _tokens, "0 2.linear1 2.linear2 3"),
    "shared": (_Twice, (9, 6), _labels, "inner head"),
    "tied": (_Tied, (3, 5), _tokens, "embed out"),
    "checkpoint": (partial(_Checkpointed, reentrant=False), (9, 6), _labels, _BLOCK),
    "reentrant": (partial(_Checkpointed, reentrant=True), (9, 6), _labels, _BLOCK),
    "lstm": (_Recurrent, (9, 4, 6), _labels, "embed head"),
    "frozen": (_partly_frozen, (9, 6), _labels, "0 2 4 6"),
}


def _draw(name: str) -> Tensor:
    shape = MODELS[name][1]
    return torch.randint(7, shape) if name == "tied" else torch.randn(shape, dtype=D)


@pytest.mark.filterwarnings("ignore:.*of the trainable weights are in no layer")
@pytest.mark.parametrize("loss", ["matching", "squared", "quadratic"])
@pytest.mark.parametrize("name", MODELS)
def test_one_local_step_is_backpropagation(name: str, loss: str) -> None:
    build, _, objective, _ = MODELS[name]
    model = build().double()
    twin, before = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    optimizers = [
        LocoProp(model, 0.02, target_lr=5.0, local_steps=1, loss=loss, local_optimizer=SGD, base=partial(SGD, lr=0.1)),
        SGD(twin.parameters(), lr=0.1),
    ]
    for step in range(3):
        x = _draw(name)
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            objective(net(x)).backward()
            optimizer.step()
    assert difference(model.state_dict().values(), twin.state_dict().values()) < 1e-12
    for (p, start), (what, _) in zip(
        zip(model.parameters(), before, strict=True), model.named_parameters(), strict=True
    ):
        if p.ndim > 1 or not p.requires_grad:  # a bias below a norm has no gradient
            assert torch.equal(p, start) != p.requires_grad, what


@pytest.mark.parametrize("name", MODELS)
def test_what_is_captured_describes_the_layers(name: str) -> None:
    build, _, objective, expected = MODELS[name]
    model, x = build().double(), _draw(name)
    capture = Capture(model)
    capture.gradients, capture.output_layers = True, {layer.name for layer in capture.layers}
    capture.attach()
    assert " ".join(layer.name for layer in capture.layers) == expected
    objective(model(x)).backward()
    for unit in capture.units:
        found = {p: torch.zeros_like(p) for p in unit.parameters}
        if not any(p.requires_grad for p in unit.parameters):
            assert not unit.calls
            continue
        for call in unit.calls:
            own, module = call.layer, call.layer.module
            assert call.gradient is not None
            assert call.z is not None
            rows, g = own.rows(own.prepare(call.x)), own.positions(own.prepare_output(call.gradient))
            found[module.weight] += own.unmatrix(g.mT @ rows)
            if (bias := getattr(module, "bias", None)) is not None:
                found[bias] += g.sum(1).flatten()
            assert difference([call.z], [module.forward(call.x)]) < 1e-13
            assert call.batch.samples == len(x)
        for p, gradient in found.items():
            assert (p.grad is not None) == p.requires_grad
            if p.grad is not None:
                assert difference([gradient], [p.grad]) < 1e-12, unit.name
                assert bool(p.grad.any())


# The second implementation: the local objective by autograd, integrals as they stand in the paper.

INTEGRALS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": lambda a, dim: a.square().sum() / 2,
    "relu": lambda a, dim: a.relu().square().sum() / 2,
    "tanh": lambda a, dim: a.cosh().log().sum(),
    "sigmoid": lambda a, dim: a.exp().log1p().sum(),
    "softmax": lambda a, dim: a.exp().sum(dim).log().sum(),
}


def _derivative(f: str, z: Tensor, dim: int) -> Tensor:
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(INTEGRALS[f](leaf, dim), leaf)[0]


def _mean_slope(f: str, outputs: list[Tensor], dim: int) -> Tensor:
    """Of each unit over all calls of its layer, shaped for multiplication with an output."""
    slopes = []
    for z in outputs:
        if f == "softmax":
            p = z.softmax(dim)
            slope = p * (1 - p)
        else:
            leaf = z.detach().requires_grad_()
            (first,) = torch.autograd.grad(INTEGRALS[f](leaf, dim), leaf, create_graph=True)
            (slope,) = torch.autograd.grad(first.sum(), leaf)
        slopes.append(slope.movedim(dim, -1).flatten(0, -2))
    shape = [-1 if d == dim % outputs[0].ndim else 1 for d in range(outputs[0].ndim)]
    return torch.cat(slopes).mean(0).view(shape)


class _Reference:
    """LocoProp on a model all of whose layers are captured.

    Args:
        units: names of the layers of each unit.
        own: settings of each unit, by the name of its first layer, over `settings`.
        blocks: for each local step but the first, the samples that are looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[list[str]],
        transfers: Mapping[str, str],
        local: Callable[..., torch.optim.Optimizer],
        blocks: list[tuple[int, int]] | None = None,
        own: Mapping[str, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.transfers, self.blocks = model, transfers, blocks
        self.units: list[tuple[list[str], list[nn.Parameter], torch.optim.Optimizer, dict[str, Any]]] = []
        for names in units:
            mine = {"schedule": lambda k, steps: 1.0, "prox": 0.0, "trust": None} | settings
            mine |= dict((own or {}).get(names[0], {}))
            modules = [model.get_submodule(n) for n in names]
            parameters = list(dict.fromkeys(p for m in modules for p in m.parameters()))
            self.units.append((names, parameters, local(parameters, lr=mine["lr"]), mine))

    def step(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        inputs: dict[str, list[Tensor]] = {name: [] for names, *_ in self.units for name in names}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: inputs[name].append(args[0].detach())
            )
            for name in inputs
        ]
        gradients = torch.autograd.grad(loss(self.model(x)), list(self.model.parameters()))
        found = dict(zip(self.model.parameters(), gradients, strict=True))
        for handle in handles:
            handle.remove()
        for names, parameters, local, mine in self.units:
            before = {p: p.detach().clone() for p in parameters}
            for k in range(mine["local_steps"]):
                total = sum(mine["target_lr"] * (found[p] * (p - w)).sum() for p, w in before.items())
                total = total + sum(mine["prox"] / 2 * (p - w).square().sum() for p, w in before.items())
                for name in names:
                    total = total + self._divergence(name, inputs[name], before, mine["loss"], k)
                local.param_groups[0]["lr"] = mine["lr"] * mine["schedule"](k, mine["local_steps"])
                for p, g in zip(parameters, torch.autograd.grad(total, parameters), strict=True):  # type: ignore[arg-type]
                    p.grad = g
                local.step()
            if mine["trust"] is not None:
                size = torch.cat([w.flatten() for w in before.values()]).norm()
                change = torch.cat([(p - w).detach().flatten() for p, w in before.items()]).norm()
                for p, w in before.items():
                    p.data = w + min(1.0, float(mine["trust"] * size / change)) * (p.data - w)

    def _divergence(self, name: str, inputs: list[Tensor], before: Mapping[Any, Tensor], loss: str, k: int) -> Any:
        module = self.model.get_submodule(name)
        weights = {n: before[p] for n, p in module.named_parameters()}
        dim = 1 if isinstance(module, nn.Conv2d) else -1
        f = "identity" if loss == "squared" else self.transfers[name]
        slope = None
        if loss == "quadratic":
            slope = _mean_slope(f, [functional_call(module, weights, (x,)) for x in inputs], dim)
        total: Any = 0.0
        for whole in inputs:
            x = whole[slice(*self.blocks[k - 1])] if self.blocks is not None and k else whole
            a, z = module(x), functional_call(module, weights, (x,))
            if slope is not None:
                found = (slope * (a - z).square()).sum() / 2
            else:
                found = INTEGRALS[f](a, dim) - INTEGRALS[f](z, dim) - (_derivative(f, z, dim) * (a - z)).sum()
            total = total + found * len(whole) / len(x)
        return total


LOCAL: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(SGD, momentum=0.5),
    "adam": ADAM,
    "rmsprop": partial(RMSProp, momentum=0.9),
}
# Name: units, transfers.
STRUCTURE: dict[str, tuple[list[list[str]], dict[str, str]]] = {
    "mlp": ([["0"], ["2"], ["4"]], {"0": "relu", "2": "relu", "4": "softmax"}),
    "cnn": ([["0"], ["2"], ["4"], ["7"]], {"0": "tanh", "2": "sigmoid", "4": "tanh", "7": "softmax"}),
    "shared": ([["inner"], ["head"]], {"inner": "tanh", "head": "softmax"}),
    "tied": ([["embed", "out"]], {"embed": "tanh", "out": "softmax"}),
    "sigmoid": ([["0"], ["2"], ["4"]], {"0": "sigmoid", "2": "sigmoid", "4": "sigmoid"}),
}


def _model(name: str) -> tuple[nn.Module, Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    if name != "sigmoid":
        build, _, loss, _ = MODELS[name]
        return build().double(), partial(_draw, name), loss
    target = torch.rand(9, 3, dtype=D)
    model = mlp(6, 7, 5, 3, activation="sigmoid").double()
    return model, partial(_draw, "mlp"), lambda out: F.binary_cross_entropy_with_logits(out, target)


def _compare(
    name: str,
    local: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any] | None = None,
    limit: float = 1e-11,
) -> LocoProp:
    """Train a model and its twin, one by LocoProp, one by the reference, with settings in the words of either."""
    model, draw, loss = _model(name)
    units, transfers = STRUCTURE[name]
    common = {
        "lr": 0.002 if local == "sgd" and name == "cnn" else 0.01,
        "target_lr": 4.0,
        "local_steps": 5,
        "loss": "matching",
    }
    words = {key: value for key, value in ours.items() if key in common}
    reference = _Reference(
        copy.deepcopy(model), units, transfers, LOCAL[local], **(common | words | dict(theirs or {}))
    )
    settings = {"local_schedule": "constant", "transfer": transfers} | common | dict(ours)
    optimizer = LocoProp(model, local_optimizer=LOCAL[local], **settings)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        x = draw()
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
        reference.step(x, loss)
    assert difference(model.parameters(), reference.model.parameters()) < limit
    assert all(float((p - s).detach().abs().max()) > 1e-5 for p, s in zip(model.parameters(), start, strict=True))
    return optimizer


@pytest.mark.parametrize(("local", "steps"), [("sgd", 2), ("sgd", 5), ("adam", 5), ("rmsprop", 5)])
@pytest.mark.parametrize(
    ("loss", "gram"),
    [("matching", None), ("squared", None), ("squared", True), ("squared", False), ("quadratic", None)],
)
@pytest.mark.parametrize("name", STRUCTURE)
def test_local_steps_are_those_of_the_definition(
    name: str, loss: str, gram: bool | None, local: str, steps: int
) -> None:
    # Adam divides by its own eps where a gradient is 0 but for rounding.
    _compare(name, local, {"loss": loss, "gram": gram, "local_steps": steps}, limit=1e-8 if local == "adam" else 1e-11)


@pytest.mark.parametrize("loss", ["matching", "squared", "quadratic"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tied"])
def test_settings_of_the_local_problem(name: str, loss: str) -> None:
    both = {"loss": loss}
    _compare(name, "sgd", {**both, "prox": 3.0}, {"prox": 3.0})
    _compare(name, "sgd", {**both, "target_lr": 0.7, "lr": 0.004})
    _compare(name, "sgd", {**both, "trust": 0.01}, {"trust": 0.01})
    _compare(name, "sgd", {**both, "trust": 1e3})
    linear = {0: 1.0, 1: 0.8, 2: 0.6, 3: 0.4, 4: 0.25}
    _compare(name, "rmsprop", {**both, "local_schedule": "linear"}, {"schedule": lambda k, steps: linear[k]})
    falling = {"local_schedule": lambda k, steps: (k + 1) / steps}
    _compare(name, "rmsprop", {**both, **falling}, {"schedule": falling["local_schedule"]})


@pytest.mark.parametrize("share", [0.5, 4])
def test_blocks_of_the_batch_take_turns(share: float) -> None:
    # The last block is moved back to be whole, the next turn starts where the blocks before it end.
    blocks = {0.5: [(0, 5), (4, 9), (1, 6), (4, 9)], 4: [(0, 4), (4, 8), (5, 9), (3, 7)]}[share]
    for name in ("mlp", "cnn", "shared"):
        _compare(name, "sgd", {"rows": share}, {"blocks": blocks})
        _compare(name, "sgd", {"rows": share, "loss": "squared", "gram": False}, {"blocks": blocks})
        _compare(name, "sgd", {"rows": share, "loss": "squared", "gram": True}, {"blocks": blocks[:1] * 4})


def test_all_rows_are_as_none() -> None:
    for rows in (1.0, 9, 500):
        _compare("mlp", "sgd", {"rows": rows})


def test_layers_may_have_settings_of_their_own() -> None:
    head = {"lr": 0.003, "target_lr": 9.0, "local_steps": 2, "loss": "squared"}
    optimizer = _compare(
        "cnn",
        "sgd",
        {"layers": {"7": head, "[24]": {"local_steps": 3}}},
        {"own": {"7": head, "2": {"local_steps": 3}, "4": {"local_steps": 3}}},
    )
    assert [(g["name"], g["local_steps"]) for g in optimizer.param_groups] == [("0", 5), ("2", 3), ("4", 3), ("7", 2)]


def test_transfers_that_are_found_do_as_those_that_are_given() -> None:
    for name, (_, transfers) in STRUCTURE.items():
        optimizer = _compare(name, "sgd", {"transfer": {}})
        assert optimizer.transfers == transfers


class _Tanh(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh_() if self.inplace else x.tanh()


@pytest.mark.parametrize("loss", ["matching", "quadratic"])
def test_activations_in_place_change_nothing(loss: str) -> None:
    models = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 3), _Tanh(inplace), nn.Flatten(), nn.Linear(108, 4), _Tanh(inplace), nn.Linear(4, 3)]
        model = nn.Sequential(*layers).double()
        optimizer = LocoProp(model, 0.01, loss=loss, local_optimizer=SGD)
        for _ in range(2):
            optimizer.zero_grad()
            _labels(model(_draw("cnn"))).backward()
            optimizer.step()
        assert optimizer.transfers == {"0": "tanh", "3": "tanh", "5": "softmax"}
        models.append(model)
    assert difference(models[0].parameters(), models[1].parameters()) < 1e-14


def test_the_local_optimizer_is_rmsprop_unless_another_is_given() -> None:
    model, draw, loss = _model("mlp")
    twin = copy.deepcopy(model)
    how: dict[str, Any] = {"momentum": 0.8, "alpha": 0.7, "eps": 1e-3}
    optimizers = [LocoProp(model, 1e-3, **how), LocoProp(twin, 1e-3, local_optimizer=partial(RMSProp, **how))]
    for _ in range(3):
        x = draw()
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss(net(x)).backward()
            optimizer.step()
    assert difference(model.parameters(), twin.parameters()) == 0
