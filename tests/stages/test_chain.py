"""How models are cut, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SGD, Residual, blobs, convnet, mlp
from torch import Tensor, nn

from beyondprop import AltMin, Chain, UnsupportedModelError
from beyondprop.stages.affine import AffineStage


def _kinds(chain: Chain) -> list[list[str]]:
    return [[type(m).__name__ for m in stage.modules] for stage in chain]


def test_linear_cuts_end_with_weights_and_their_norm() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        Residual(8),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
        nn.Softmax(1),
    )
    chain = Chain(model)
    assert _kinds(chain) == [
        ["Conv2d", "BatchNorm2d"],
        ["ReLU", "MaxPool2d", "Conv2d", "GroupNorm"],
        ["ReLU", "Flatten", "Linear", "LayerNorm"],
        ["Tanh", "Residual"],
        ["LayerNorm", "Linear", "Softmax"],
    ]
    assert [s.name for s in chain] == ["0.0", "2.0", "3", "6", "8"]
    assert len(chain) == 5
    assert chain[0].name in repr(chain)


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(3, affine=True), nn.InstanceNorm2d(3), nn.BatchNorm2d(3, affine=False)]
)
def test_a_norm_joins_the_convolution_before_it(norm: nn.Module) -> None:
    chain = Chain(nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)))
    assert _kinds(chain)[0] == ["Conv2d", type(norm).__name__]
    assert len(chain) == 2


@pytest.mark.parametrize(
    "cuts",
    ["linear", "block", ["0", "2"], ["2", "4"]],
)
def test_every_way_to_cut_computes_what_the_model_computes(cuts: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Residual(6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    trace = Chain(model, cuts).record(x)
    torch.testing.assert_close(trace.output, model(x), rtol=0, atol=0)
    assert sum(len(s.modules) for s in Chain(model, cuts)) == len(model)
    assert len({p for s in Chain(model, cuts) for p in s.parameters}) == len(list(model.parameters()))


def test_block_cuts_follow_the_outermost_children() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3))
    assert _kinds(Chain(model, "block")) == [["Sequential"], ["ReLU", "Linear"]]
    assert _kinds(Chain(model, ["0.0", "2"])) == [["Linear"], ["ReLU", "Linear", "ReLU", "Linear"]]


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class _Choosing(_Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)) if x.sum() > 0 else self.last(self.act(self.first(x)))


class _OwnFunctional(_Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.act(self.first(x))))


def test_a_list_of_blocks_serves_a_model_with_its_own_forward() -> None:
    model = _Own()
    chain = Chain(model, [model.first, model.act, model.last])
    assert [s.name for s in chain] == ["first", "last"]
    x = torch.randn(5, 4)
    assert torch.equal(chain.record(x).output, model(x))


def test_blocks_that_are_not_the_forward_pass_are_refused() -> None:
    model = _OwnFunctional()
    rule = AltMin(model, nn.CrossEntropyLoss(), SGD, cuts=[model.first, model.act, model.last])
    with pytest.raises(UnsupportedModelError, match=r"do not compute what _OwnFunctional computes.*in the order"):
        rule.step(torch.randn(5, 4), torch.arange(5) % 3)
    with pytest.raises(
        UnsupportedModelError, match=r"Parameter 'act.*|Parameter 'last.weight' .* in none of the blocks"
    ):
        Chain(model, [model.first, nn.Linear(5, 3)])


def test_the_composition_check_leaves_the_mode_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    model[1].eval()
    blocks = list(model)
    Chain(model, blocks).record(torch.randn(6, 4))
    assert model.training
    assert not model[1].training
    assert model[2].training


def test_stages_below_the_lowest_trainable_one_are_not_recorded() -> None:
    model = mlp(4, 5, 5, 3)
    model[0].requires_grad_(False)
    trace = Chain(model).record(torch.randn(2, 4))
    assert trace.lowest == 1
    with pytest.raises(IndexError, match="Stage 0"):
        trace[0]
    assert trace[1].input.shape == (2, 5)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "one_stage": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), "linear", "1 stage.*2 or more.*hidden layer"),
    "no_weights": (lambda: nn.Sequential(nn.ReLU()), "linear", "0 stage"),
    "own_forward": (
        _Choosing,
        "linear",
        "_Choosing has a forward pass of its own that cannot be traced.*nn.Sequential.*cuts=",
    ),
    "branch": (lambda: Residual(4), "linear", "Residual has 1 stage.*branches around 'inner.2', which is one block"),
    "module_list": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 3)),
        "linear",
        "ModuleList at '1' has no forward",
    ),
    "inplace_relu": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
        "linear",
        r"ReLU\(inplace=True\) at '1', head of stage '2'.*inplace=False",
    ),
    "inplace_behind_flatten": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Dropout(inplace=True), nn.Linear(4, 3)),
        "linear",
        r"Dropout\(inplace=True\) at '2'",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3)), "linear", "'0' has lazy parameters"),
    "name": (lambda: mlp(4, 5, 3), ["0", "7"], "'7'.*none of the model's modules: 0, 1, 2"),
    "keyword": (lambda: mlp(4, 5, 3), "layer", "cuts must be 'linear', 'block', .* got 'layer'"),
    "empty": (lambda: mlp(4, 5, 3), [], "cuts is an empty list"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_cut_is_refused(case: str) -> None:
    build, cuts, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Chain(build(), cuts)


def test_a_cut_without_weights_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="ends with '1' has no weights; drop it"):
        Chain(mlp(4, 5, 3), ["0", "1"])


def test_names_and_modules_do_not_mix() -> None:
    with pytest.raises(TypeError, match="list of names or a list of modules"):
        Chain(mlp(4, 5, 3), ["0", nn.ReLU()])  # type: ignore[list-item]


@pytest.mark.parametrize("how", ["module", "parameter"])
def test_tied_weights_are_refused(how: str) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    if how == "module":
        second = first
    else:
        second.weight = first.weight
    with pytest.raises(UnsupportedModelError, match=r"Stages '0' and '2' share a parameter.*one block"):
        Chain(nn.Sequential(first, nn.ReLU(), second))


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


def test_a_module_that_overwrites_its_input_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _InPlace(), nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match=r"Stage '2' changes its input in place.*inplace=False"):
        AltMin(model, nn.CrossEntropyLoss(), SGD).step(torch.randn(5, 4), torch.arange(5) % 3)


def test_merging_batch_and_time_is_refused_where_codes_lose_their_sample() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Flatten(0, 1), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(UnsupportedModelError, match=r"Stage '3'.*first dimension is the batch"):
        AltMin(model, lambda o, y: (o - y.flatten(0, 1)).square().mean(), SGD).step(
            torch.randn(6, 2, 4), torch.randn(6, 2, 3)
        )


def test_in_place_inside_a_stage_is_fine() -> None:
    model = convnet()
    chain = Chain(nn.Sequential(model[0], nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3)))
    assert not isinstance(chain[1], AffineStage)
    assert chain.record(torch.randn(2, 1, 8, 8)).output.shape == (2, 3)


def _double(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module, inputs
    return 2 * output


def test_a_sequential_with_hooks_is_not_cut() -> None:
    model = mlp(4, 5, 3)
    model.register_forward_hook(_double)
    with pytest.raises(UnsupportedModelError, match="Sequential has hooks and cannot be cut"):
        Chain(model)


SETTINGS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "leaky": (nn.LeakyReLU, {"negative_slope": 0.5}),
    "softplus": (nn.Softplus, {"beta": 3.0, "threshold": 1.0}),
    "gelu": (nn.GELU, {"approximate": "tanh"}),
    "hardtanh": (nn.Hardtanh, {"max_val": 0.2}),
    "elu": (nn.ELU, {"alpha": 2.0}),
}


def _gradients(chain: Chain, x: Tensor, y: Tensor) -> list[Tensor]:
    chain.model.zero_grad()
    trace = chain.record(x)
    output = trace.output.detach().requires_grad_()
    (delta,) = torch.autograd.grad(nn.functional.cross_entropy(output, y), output)
    for index in reversed(range(len(chain))):
        trace[index].add_gradients(delta, 1.0)
        delta = trace[index](delta) if index else delta
    return [p.grad.clone() for p in chain.model.parameters() if p.grad is not None]


def _own_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters())))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_settings_of_activations_may_change(name: str) -> None:
    build, settings = SETTINGS[name]
    model = nn.Sequential(nn.Linear(6, 8), build(), nn.Linear(8, 3)).double()
    x, y = blobs(12, dtype=torch.float64)
    chain = Chain(model)
    _gradients(chain, x, y)
    for key, value in settings.items():
        setattr(model[1], key, value)
    for found, own in zip(_gradients(chain, x, y), _own_gradients(model, x, y), strict=True):
        torch.testing.assert_close(found, own)


@pytest.mark.parametrize("index", [1, 2])
def test_a_forward_pass_of_its_own_is_called_or_refused(index: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = blobs(12, dtype=torch.float64)
    before, own = Chain(model), model[index]
    before.record(x)
    given = own.forward
    own.forward = lambda input: 2 * given(input)
    with pytest.raises(UnsupportedModelError, match="got another forward pass after the rule was built"):
        before.record(x)
    for found, right in zip(_gradients(Chain(model), x, y), _own_gradients(model, x, y), strict=True):
        torch.testing.assert_close(found, right)
