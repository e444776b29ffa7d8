"""Transfer functions, their slopes and matching losses; which transfer is read from an autograd graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import difference
from hypothesis import given, settings
from hypothesis import strategies as st
from references import integral, matching_loss
from torch import Tensor, nn

from beyondprop import LocoProp
from beyondprop.optim import _graph
from beyondprop.optim.matching import NAMES, Transfer, transfer

CASES: dict[str, Transfer] = {name: transfer(name) for name in NAMES} | {
    "leaky_relu": transfer("leaky_relu", negative_slope=0.25),
    "leaky_relu 0": transfer("leaky_relu", negative_slope=0.0),
    "softplus 2.5": transfer("softplus", beta=2.5, threshold=60.0),
    "softplus 0.5": transfer("softplus", beta=0.5),
}
ELEMENTWISE = {name: f for name, f in CASES.items() if name != "softmax"}
cases = pytest.mark.parametrize("f", CASES.values(), ids=CASES.keys())
elementwise = pytest.mark.parametrize("f", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())

# What torch calls each of them; softmax over the last dimension.
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.25),
    "leaky_relu 0": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softplus 2.5": partial(F.softplus, beta=2.5, threshold=60.0),
    "softplus 0.5": partial(F.softplus, beta=0.5),
    "softmax": partial(torch.softmax, dim=-1),
}


def _draw(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def _grid(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64).unsqueeze(-1)


@cases
@pytest.mark.parametrize(("scale", "limit"), [(2.0, 1e-12), (30.0, 1e-8)])
def test_the_gradient_of_the_matching_loss_is_the_difference_of_transfers(
    f: Transfer, scale: float, limit: float
) -> None:
    a, z = _draw(7, 5, scale=scale).requires_grad_(), _draw(7, 5, scale=scale)
    (gradient,) = torch.autograd.grad(matching_loss(a, z, f), a)
    assert float((gradient - (f.value(a.detach(), -1) - f.value(z, -1))).abs().max()) < limit


@pytest.mark.parametrize("name", TORCH)
def test_values_are_torchs(name: str) -> None:
    z = _draw(7, 5, scale=10.0)
    assert difference([CASES[name].value(z, -1)], [TORCH[name](z)]) < 5e-16
    single = z.float()
    assert difference([CASES[name].value(single, -1)], [TORCH[name](single)]) < 2e-7
    assert torch.equal(transfer("leaky_relu").value(z, -1), F.leaky_relu(z))  # torch's default slope is ours


@cases
def test_values_may_be_written_over_the_input(f: Transfer) -> None:
    z = _draw(7, 5)
    expected = f.value(z, -1)
    assert torch.equal(f.value_(z.clone(), -1), expected)
    assert torch.equal(f.value(z, -1), expected)  # `value` itself has written over nothing


@cases
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_matching_losses_are_not_negative(f: Transfer, data: st.DataObject) -> None:
    numbers = st.lists(st.floats(-40, 40), min_size=3, max_size=3)
    a, z = (torch.tensor([data.draw(numbers)], dtype=torch.float64) for _ in range(2))
    size = 1 + float(a.abs().max() + z.abs().max())
    assert float(matching_loss(a, z, f)) >= -1e-9 * size
    assert float(matching_loss(z, z, f)) == 0


@cases
def test_matching_losses_are_positive_where_outputs_differ(f: Transfer) -> None:
    a, z = _draw(9, 4).abs() + 0.1, _draw(9, 4).abs() + 0.1
    for i in range(9):
        assert float(matching_loss(a[i : i + 1], z[i : i + 1], f)) > 1e-4


@elementwise
def test_transfers_do_not_decrease(f: Transfer) -> None:
    values = f.value(_grid(-25, 25, 20001), -1).squeeze(-1)
    assert float(values.diff().min()) > -5e-9  # softplus becomes the identity at its threshold
    assert float(values.diff().max()) > 0


def test_softmax_is_monotone() -> None:
    f, a, z = transfer("softmax"), _draw(50, 4), _draw(50, 4)
    assert float(((f.value(a, -1) - f.value(z, -1)) * (a - z)).sum(-1).min()) > 0


@cases
def test_slopes_are_the_derivatives_of_values(f: Transfer) -> None:
    z = _draw(8, 5, scale=3.0)
    z = torch.where(z.abs() < 1e-3, 1.0, z)
    expected = [torch.autograd.functional.jacobian(lambda s: f.value(s, -1), row).diagonal() for row in z]  # type: ignore[union-attr]
    assert float((f.slope(z, -1) - torch.stack(expected)).abs().max()) < 1e-12
    assert f.slope(z, -1).dtype is torch.float64


def test_divergences_that_have_a_name() -> None:
    a, z = _draw(6, 4), _draw(6, 4)
    assert float(matching_loss(a, z, transfer("identity"))) == pytest.approx(float((a - z).square().sum()) / 2)
    p, q = torch.softmax(z, -1), torch.softmax(a, -1)
    assert float(matching_loss(a, z, transfer("softmax"))) == pytest.approx(float((p * (p / q).log()).sum()))
    p, q = torch.sigmoid(z), torch.sigmoid(a)
    bernoulli = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert float(matching_loss(a, z, transfer("sigmoid"))) == pytest.approx(float(bernoulli.sum()))
    assert float(integral(transfer("tanh"), a).sub(a.cosh().log()).abs().max()) < 1e-14
    log_cosh = a.cosh().log() - z.cosh().log() - z.tanh() * (a - z)
    assert float(matching_loss(a, z, transfer("tanh"))) == pytest.approx(float(log_cosh.sum()))


def test_only_softmax_looks_at_the_dimension() -> None:
    z = _draw(3, 4, 5)
    for name, f in CASES.items():
        other, last = f.value(z, 1), f.value(z.movedim(1, -1), -1).movedim(-1, 1)
        assert torch.allclose(other, last, rtol=0, atol=1e-15), name
        assert torch.allclose(f.slope(z, 1), f.slope(z.movedim(1, -1), -1).movedim(-1, 1), rtol=0, atol=1e-15), name
        a = z.flip(0)
        ours = float(matching_loss(a, z, f, dim=1))
        assert ours == pytest.approx(float(matching_loss(a.movedim(1, -1), z.movedim(1, -1), f)), rel=1e-12), name
    assert float(transfer("softmax").value(z, 1).sum(1).sub(1).abs().max()) < 1e-14


@pytest.mark.parametrize(("name", "form"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_is_torchs_right_of_its_minimum_and_constant_left_of_it(name: str, form: str) -> None:
    f = transfer(name)
    grid = torch.linspace(-1, 0, 1_000_001, dtype=torch.float64)
    lowest = F.gelu(grid, approximate=form).min()
    minimum = float(grid[F.gelu(grid, approximate=form).argmin()])
    right, left = _grid(minimum + 1e-5, 15, 1001), _grid(-15, minimum - 1e-5, 1001)
    assert torch.equal(f.value(right, -1), F.gelu(right, approximate=form))
    assert float((f.value(left, -1) - lowest).abs().max()) < 1e-12
    assert float(f.slope(left, -1).abs().max()) == 0
    assert float(f.slope(right, -1).min()) > 0


@cases
@pytest.mark.parametrize("size", [90.0, 1e4])
def test_nothing_overflows_in_single_precision(f: Transfer, size: float) -> None:
    z = torch.tensor([[size, -size, 0.5, -0.5]])
    for function in (f.value, f.slope):
        found = function(z, -1)
        assert found.dtype is torch.float32
        assert torch.allclose(found, function(z.double(), -1).float(), rtol=1e-6, atol=1e-6)
        assert bool(found.isfinite().all())


def test_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"transfer must be one of 'identity', .*'softmax', got 'mish'"):
        transfer("mish")
    with pytest.raises(ValueError, match=r"negative_slope must be >= 0 .*got -0\.1"):
        transfer("leaky_relu", negative_slope=-0.1)
    assert [name for name in NAMES if transfer(name).is_identity] == ["identity"]


# What follows a layer, read from the graph of the first backward pass.

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (F.relu, "relu"),
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU in place": (nn.ReLU(inplace=True), "relu"),
    "tanh": (torch.tanh, "tanh"),
    "Tensor.tanh": (Tensor.tanh, "tanh"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "nn.Sigmoid": (nn.Sigmoid(), "sigmoid"),
    "leaky_relu": (partial(F.leaky_relu, negative_slope=0.2), "leaky_relu"),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2), "leaky_relu"),
    "tanh in place": (Tensor.tanh_, "tanh"),
    "sigmoid in place": (Tensor.sigmoid_, "sigmoid"),
    "softplus": (partial(F.softplus, beta=2.0, threshold=9.0), "softplus"),
    "nn.Softplus": (nn.Softplus(beta=2.0, threshold=9.0), "softplus"),
    "gelu": (F.gelu, "gelu"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "gelu tanh": (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "softmax": (partial(torch.softmax, dim=-1), "softmax"),
    "log_softmax": (partial(F.log_softmax, dim=-1), "softmax"),
    "softmax over the batch": (partial(torch.softmax, dim=0), "identity"),
    "dropout": (partial(F.dropout, p=0.5), "identity"),
    "hardtanh": (F.hardtanh, "identity"),
    "silu": (F.silu, "identity"),
    "layer_norm": (lambda z: F.layer_norm(z, z.shape[-1:]), "identity"),
    "negative": (lambda z: torch.relu(-z), "identity"),
    "scaled": (lambda z: torch.tanh(2 * z), "identity"),
    "view": (lambda z: torch.tanh(z.view(-1)), "tanh"),
    "transpose and unsqueeze": (lambda z: z.t().unsqueeze(0).permute(2, 0, 1).relu(), "relu"),
    "two of the same": (lambda z: torch.relu(z) + torch.relu(z), "identity"),
    "a skip": (lambda z: z + torch.tanh(z), "identity"),
    "a reshape with two users": (lambda z: (lambda v: v.tanh() * v.relu())(z.view(-1)), "identity"),
}


class _Then(nn.Module):
    """A layer, then any function."""

    def __init__(self, layer: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = layer, [then]

    def forward(self, x: Tensor) -> Tensor:
        return self.then[0](self.layer(x))


def _found(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], **settings: Any) -> LocoProp:
    optimizer = LocoProp(model, **settings)
    loss(model(x)).backward()
    return optimizer


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_follows_a_linear_layer_is_found(name: str) -> None:
    then, expected = ACTIVATIONS[name]
    model = _Then(nn.Linear(4, 5), then)
    optimizer = _found(model, torch.randn(6, 4), lambda out: (out * out.detach().cos()).sum())
    assert optimizer.transfers == {"layer": expected}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("leaky_relu", {"negative_slope": 0.2}), ("softplus", {"beta": 2.0, "threshold": 9.0})],
)
def test_settings_of_what_follows_are_found(name: str, kwargs: dict[str, float]) -> None:
    then, _ = ACTIVATIONS[name]
    optimizer = _found(_Then(nn.Linear(4, 5), then), torch.randn(6, 4), Tensor.sum)
    optimizer.step()
    z = _grid(-3, 8, 101)
    assert torch.equal(optimizer._transfers["layer"].value(z, -1), transfer(name, **kwargs).value(z, -1))


LABELS = torch.tensor([0, 2, 1, 0, 4, 3])
LOSSES: dict[str, tuple[nn.Module, tuple[int, ...], Callable[[Tensor], Tensor], str]] = {
    "cross-entropy": (nn.Linear(4, 5), (6, 4), lambda z: F.cross_entropy(z, LABELS), "softmax"),
    "smoothed": (nn.Linear(4, 5), (6, 4), lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1), "softmax"),
    "soft labels": (nn.Linear(4, 5), (6, 4), lambda z: F.cross_entropy(z, torch.ones(6, 5) / 5), "softmax"),
    "tokens": (nn.Linear(4, 5), (2, 3, 4), lambda z: F.cross_entropy(z.view(-1, 5), LABELS), "softmax"),
    "tokens, classes second": (
        nn.Linear(4, 5),
        (2, 3, 4),
        lambda z: F.cross_entropy(z.transpose(1, 2), LABELS.view(2, 3)),
        "softmax",
    ),
    "tokens without the first": (
        nn.Linear(4, 5),
        (2, 4, 4),
        lambda z: F.cross_entropy(z[:, 1:].reshape(-1, 5), LABELS),
        "softmax",
    ),
    "segmentation": (
        nn.Conv2d(1, 5, 3, padding=1),
        (1, 1, 2, 3),
        lambda z: F.cross_entropy(z, LABELS.view(1, 2, 3)),
        "softmax",
    ),
    "softmax over channels": (nn.Conv2d(1, 5, 1), (2, 1, 3, 3), lambda z: z.softmax(1)[:, 0].sum(), "softmax"),
    "softmax over width": (nn.Conv2d(1, 5, 1), (2, 1, 3, 3), lambda z: z.softmax(3)[..., 0].sum(), "identity"),
    "binary": (
        nn.Linear(4, 5),
        (6, 4),
        lambda z: F.binary_cross_entropy_with_logits(z, torch.full((6, 5), 0.3)),
        "sigmoid",
    ),
    "squared": (nn.Linear(4, 5), (6, 4), lambda z: F.mse_loss(z, torch.ones(6, 5)), "identity"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_transfers_too(name: str) -> None:
    layer, shape, loss, expected = LOSSES[name]
    assert _found(nn.Sequential(layer), torch.randn(shape), loss).transfers == {"0": expected}


def _binary(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.3))


def _classes(z: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), torch.arange(z.shape[:-1].numel()) % z.shape[-1])


# What is chosen of the outputs, the loss of that, and the transfer function; None: that there is none is a warning.
CHOICES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str | None]] = {
    "a unit": (lambda z: z[..., 0], _binary, "sigmoid"),
    "some units": (lambda z: z[..., :-1], lambda z: torch.tanh(z).sum(), "tanh"),
    "units in another order": (lambda z: torch.cat(z.chunk(2, -1)[::-1], -1), _binary, "sigmoid"),
    "units by number": (lambda z: z[..., torch.tensor([3, 1])], _binary, "sigmoid"),
    "units beside others": (lambda z: torch.cat([z, z.detach()], -1), _binary, "sigmoid"),
    "chunks as samples": (lambda z: torch.cat(z[..., :4].chunk(2, -1)), _binary, "sigmoid"),
    "samples": (lambda z: z[1:], _classes, "softmax"),
    "every other step": (lambda z: z[:, ::2], _classes, "softmax"),
    "the last step": (lambda z: z[:, -1], _classes, "softmax"),
    "steps by number": (lambda z: z[:, torch.tensor([2, 0])], _classes, "softmax"),
    "steps by a mask": (lambda z: z[torch.tensor([[True, False, True]] * 4)], _classes, "softmax"),
    "steps of a list": (lambda z: torch.stack(z.unbind(1), 1), _classes, "softmax"),
    "twice": (lambda z: z.expand(2, *z.shape), _classes, "softmax"),
    "samples beside others": (lambda z: torch.cat([z, z.detach()]), _classes, "softmax"),
    "without padding": (
        lambda z: nn.utils.rnn.pack_padded_sequence(z, torch.tensor([3, 2, 2, 1]), batch_first=True).data,
        _classes,
        "softmax",
    ),
    "all units": (lambda z: z[..., :].contiguous(), _classes, "softmax"),
    "classes but one": (lambda z: z[..., :-1], _classes, None),
    "as many classes of others": (lambda z: torch.cat([z[..., :2], z[..., :3].detach()], -1), _classes, None),
    "classes by number": (lambda z: z.index_select(-1, torch.tensor([0, 0, 1, 2, 3])), _classes, None),
    "classes that are forbidden": (lambda z: z.masked_fill(z.detach() > 2, -9.0), _classes, None),
    "a class in all steps": (lambda z: z[..., 0], _classes, None),
    "outputs of all steps in a row": (lambda z: z.flatten(1)[:, :7], _classes, None),
    "into a buffer": (lambda z: torch.zeros(4, 3, 7).index_copy(2, torch.arange(5), z), Tensor.sum, "identity"),
    "into a slice": (lambda z: _written(z), _classes, None),
    "to a squared loss": (lambda z: z[..., :-1], lambda z: z.square().mean(), "identity"),
    "to a sum": (lambda z: z[:, 0] + z[:, 1], _classes, "identity"),
}


def _written(z: Tensor) -> Tensor:
    out = torch.zeros(4, 3, 5)
    out[:, 1:] = z[:, :-1]
    return out


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_the_outputs_is_looked_behind(name: str) -> None:
    choose, loss, expected = CHOICES[name]
    optimizer = _found(nn.Sequential(nn.Linear(4, 5)), torch.randn(4, 3, 4), lambda z: loss(choose(z)))
    if expected is None:
        with pytest.warns(UserWarning, match=r"behind the layers \['0'\] could not be read: .* over other units"):
            optimizer.step()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    assert optimizer.transfers == {"0": expected or "identity"}


@pytest.mark.parametrize("units", [5, 3])
def test_units_are_known_where_other_dimensions_are_as_long(units: int) -> None:
    """As classes that come second, with as many steps or samples."""
    layer, x, y = nn.Linear(4, units), torch.randn(3, 5, 4), torch.zeros(3, 5, dtype=torch.long)
    assert _found(layer, x, lambda z: F.cross_entropy(z.transpose(1, 2), y)).transfers == {"": "softmax"}
    assert _found(layer, x, lambda z: z.transpose(1, 2).softmax(2)[..., 0].sum()).transfers == {"": "identity"}
    assert _found(layer, x, lambda z: z.permute(2, 0, 1).softmax(0)[0].sum()).transfers == {"": "softmax"}


def test_units_are_followed_through_a_transposition_and_where_there_is_no_batch() -> None:
    square = nn.Linear(4, 5), torch.randn(5, 4)
    assert _found(*square, lambda z: z.t().softmax(0)[0].sum()).transfers == {"": "softmax"}
    assert _found(*square, lambda z: z.t().softmax(1)[0].sum()).transfers == {"": "identity"}
    image = nn.Conv2d(1, 5, 1), torch.randn(1, 5, 5)
    assert _found(*image, lambda z: z.softmax(0)[0].sum()).transfers == {"": "softmax"}
    assert _found(*image, lambda z: z.softmax(1)[0].sum()).transfers == {"": "identity"}


def test_a_single_unit_may_lose_its_dimension() -> None:
    for alone in (lambda z: z[:, 0], lambda z: z.squeeze(1), lambda z: z.view(-1)):
        optimizer = _found(nn.Sequential(nn.Linear(4, 1)), torch.randn(6, 4), lambda z, alone=alone: _binary(alone(z)))
        assert optimizer.transfers == {"0": "sigmoid"}


def test_a_whole_net_is_read_at_once() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.Unflatten(1, (2, 4)), nn.Sigmoid(), nn.Flatten()),
        nn.Linear(8, 5),
    )
    x = torch.randn(6, 1, 8, 8)
    optimizer = _found(model, x, lambda z: F.cross_entropy(z, LABELS))
    assert optimizer.transfers == {"0": "identity", "3": "relu", "7": "sigmoid", "11": "softmax"}
    optimizer.step()
    model[2] = nn.Tanh()  # type: ignore[index]
    F.cross_entropy(model(x), LABELS).backward()
    assert optimizer.transfers["0"] == "identity"  # only the first backward pass is looked at


def test_calls_that_disagree_have_no_transfer() -> None:
    class Twice(nn.Module):
        def __init__(self, second: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.layer, self.second = nn.Linear(4, 4), second

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.layer(torch.tanh(self.layer(x))))

    for second, expected in ((torch.tanh, "tanh"), (torch.relu, "identity")):
        assert _found(Twice(second), torch.randn(3, 4), Tensor.sum).transfers == {"layer": expected}


def test_transfers_can_be_given_by_name_and_pattern() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))
    own = transfer("leaky_relu", negative_slope=0.3)
    optimizer = _found(model, torch.randn(3, 4), Tensor.sum, transfer={"0.*": "sigmoid", "0.2": own})
    assert optimizer.transfers == {"0.0": "sigmoid", "0.2": "leaky_relu", "2": "identity"}
    assert optimizer._transfers["0.2"] is own
    with pytest.raises(ValueError, match=r"transfer has 'head', which fits no captured layer; these are \['0\.0', "):
        LocoProp(model, transfer={"head": "tanh"})
    with pytest.raises(ValueError, match=r"transfer must be one of .*got 'elu'"):
        LocoProp(model, transfer={"2": "elu"})


def test_the_loss_is_found_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the hooks of a device, which run in a thread of their own."""
    monkeypatch.setattr(_graph, "_is_run", lambda node: True)  # known to the engine's own threads alone
    model, found = nn.Linear(4, 5), []
    loss = F.cross_entropy(model(torch.randn(6, 4)), LABELS)

    def look(gradient: Tensor) -> None:
        thread = threading.Thread(target=lambda: found.extend(_graph.roots()))
        thread.start()
        thread.join()

    model.weight.register_hook(look)
    loss.backward()
    assert found == [loss.grad_fn]
