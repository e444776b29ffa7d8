"""Linear, Conv and Embedding as maps of their weights: outputs, gradients, rows and moments against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import difference
from torch import Tensor, nn

from beyondprop.optim import _maps
from beyondprop.optim._maps import ConvMap, EmbeddingMap, LayerMap, LinearMap, layer_map
from beyondprop.optim.projection import RowMoments, moments

# Name: module, shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear of a vector": (lambda: nn.Linear(5, 3), (5,)),
    "linear of tokens": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "linear of a 4-D input": (lambda: nn.Linear(5, 3), (2, 3, 2, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (7, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (3, 4, 11)),
    "conv1d in groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (3, 4, 7)),
    "depthwise conv1d": (lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), (3, 4, 7)),
    "conv1d unbatched": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 2, 7, 6)),
    "conv2d in groups": (
        lambda: nn.Conv2d(6, 4, 3, stride=2, padding=(2, 1), dilation=(1, 2), groups=2),
        (3, 6, 9, 8),
    ),
    "conv2d without bias": (lambda: nn.Conv2d(2, 5, 3, bias=False), (3, 2, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 5, (4, 3), padding="same", dilation=(1, 2)), (3, 2, 6, 5)),
    "conv2d valid": (lambda: nn.Conv2d(2, 5, 3, padding="valid"), (3, 2, 6, 5)),
    "conv2d circular": (lambda: nn.Conv2d(2, 5, 3, padding=(2, 1), padding_mode="circular"), (3, 2, 6, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), (3, 4, 6, 5)),
    "conv2d replicate": (lambda: nn.Conv2d(2, 5, 3, padding=1, padding_mode="replicate", stride=2), (3, 2, 6, 5)),
    "conv2d circular same": (lambda: nn.Conv2d(2, 5, (3, 4), padding="same", padding_mode="circular"), (3, 2, 6, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(2, 5, 3, padding=1), (2, 5, 4)),
    "conv2d reflect unbatched": (lambda: nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect"), (2, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0)), (2, 2, 4, 5, 3)),
    "conv3d in groups": (lambda: nn.Conv3d(4, 4, 2, groups=2, dilation=(1, 2, 1)), (2, 4, 3, 4, 3)),
    "conv3d unbatched": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
}
EMBEDDINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "embedding": (lambda: nn.Embedding(9, 4), (7,)),
    "embedding of sequences": (lambda: nn.Embedding(9, 4), (3, 5)),
    "embedding of one number": (lambda: nn.Embedding(9, 4), ()),
    "embedding with padding": (lambda: nn.Embedding(9, 4, padding_idx=2), (3, 5)),
}
ALL = LAYERS | EMBEDDINGS
names = pytest.mark.parametrize("name", ALL)
# Of torch, about kernels of even size.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def _case(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, LayerMap, Tensor]:
    build, shape = ALL[name]
    module = build().to(dtype)
    if name in EMBEDDINGS:
        x = torch.randint(9, shape)
        if "padding" in name:
            x[0, :2] = 2
    else:
        x = torch.randn(shape, dtype=dtype)
    return module, layer_map(module), x


def _bias(module: Any) -> Tensor | None:
    return getattr(module, "bias", None)


def _loss_gradients(module: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A random gradient at the output, and what autograd makes of it at the weights."""
    out = module(x)
    g = torch.randn_like(out)
    return g, list(torch.autograd.grad(out, list(module.parameters()), g))


def test_kinds() -> None:
    assert type(layer_map(nn.Linear(2, 3))) is LinearMap
    assert type(layer_map(nn.Embedding(2, 3))) is EmbeddingMap
    for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        own = layer_map(conv(4, 6, 3, groups=2))
        assert type(own) is ConvMap
        assert (own.units, own.groups, own.fan_in, own.features) == (6, 2, 2 * 3**own.spatial, 1)
    own = layer_map(nn.Embedding(9, 4))
    assert (own.units, own.groups, own.fan_in, own.features) == (4, 1, 9, -1)


@names
def test_the_map_is_the_module(name: str) -> None:
    module, own, x = _case(name)
    z = own(own.prepare(x), module.weight, _bias(module))
    expected = own.prepare_output(module(x))
    assert z.shape == expected.shape
    assert torch.equal(z, expected)
    other = [torch.randn_like(p) for p in module.parameters()]
    moved = own(own.prepare(x), other[0], other[1] if len(other) == 2 else None)
    for p, q in zip(module.parameters(), other, strict=True):
        p.data.copy_(q)
    assert torch.equal(moved, own.prepare_output(module(x)))


@names
def test_gradients_are_autograds(name: str) -> None:
    module, own, x = _case(name)
    g, expected = _loss_gradients(module, x)
    x, g = own.prepare(x), own.prepare_output(g)
    start = [torch.randn_like(p) for p in module.parameters()]
    ours = [s.clone() for s in start]
    with torch.no_grad():
        own.add_gradients(x, g, ours[0], ours[1] if len(ours) == 2 else None, -1.5)
        own.add_gradients(x, g, ours[0], None, 0.5)
        if len(ours) == 2:
            own.add_gradients(x, g, None, ours[1], 0.5)
    assert difference(ours, [s - e for s, e in zip(start, expected, strict=True)]) < 1e-12


@names
def test_rows_and_positions_are_the_inputs_and_outputs_of_the_matrix(name: str) -> None:
    module, own, x = _case(name)
    g, (expected, *of_bias) = _loss_gradients(module, x)
    rows, positions = own.rows(own.prepare(x)), own.positions(own.prepare_output(g))
    assert rows.shape == (own.groups, own.count(x), own.fan_in)
    assert positions.shape == (own.groups, own.count(x), own.units // own.groups)
    with torch.no_grad():
        out = rows @ own.matrix(module.weight).mT
        if of_bias:
            out += module.bias.view(own.groups, 1, -1)
        assert difference([out], [own.positions(own.prepare_output(module(x)))]) < 1e-12
    gradient = own.unmatrix(positions.mT @ rows)
    if getattr(module, "padding_idx", None) is not None:
        gradient[module.padding_idx] = 0  # whose row autograd leaves alone
    assert difference([gradient], [expected]) < 1e-12
    if of_bias:
        assert difference([positions.sum(1).flatten()], of_bias) < 1e-12


@names
def test_matrices_are_undone(name: str) -> None:
    module, own, _ = _case(name)
    matrix = own.matrix(module.weight)
    assert matrix.shape == (own.groups, own.units // own.groups, own.fan_in)
    assert torch.equal(own.unmatrix(matrix), module.weight)


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moments_are_those_of_the_rows(name: str, dtype: torch.dtype) -> None:
    _, own, x = _case(name, dtype)
    found, expected = own.moments(own.prepare(x)), moments(own.rows(own.prepare(x)))
    if name in EMBEDDINGS:
        diagonal = expected.inner.diagonal(dim1=-2, dim2=-1)
        assert difference([diagonal.diag_embed()], [expected.inner]) == 0
        expected = RowMoments(diagonal, *expected[1:])
        if own.module.padding_idx is not None:  # its row gets no gradient: nothing is seen of it
            for part in expected[:2]:
                part[:, own.module.padding_idx] = 0
            expected = expected._replace(rows=expected.inner.sum())
    limit = 1e-12 if dtype is torch.float64 else 1e-4
    assert [part.dtype for part in found] == [dtype] * 3
    assert [part.shape for part in found] == [part.shape for part in expected]
    assert difference(found, expected) < limit
    assert float(found.rows) == float(expected.rows)


@names
def test_the_moments_of_nothing_are_zero(name: str) -> None:
    _, own, x = _case(name)
    none, some = own.no_moments(), own.moments(own.prepare(x))
    assert difference(none + some, some) == 0


@pytest.mark.parametrize("name", [name for name in LAYERS if "conv" in name])
@pytest.mark.parametrize("mirror", [False, True])
def test_patches_taken_in_parts_have_the_same_moments(name: str, mirror: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, own, x = _case(name)
    x = own.prepare(x)
    x = torch.cat([x, -x, 2 * x, x.flip(-1), x.flip(-2)])
    whole = own.moments(x, mirror=mirror)
    held: list[int] = []
    rows = own.rows
    monkeypatch.setattr(own, "rows", lambda part: held.append(len(part)) or rows(part))
    one = own.rows(x[:1]).numel()
    for limit, most in ((1, 1), (one, 1), (2 * one + 1, 2), (3 * one - 1, 2)):
        monkeypatch.setattr(_maps, "_PATCH_LIMIT", limit)
        held.clear()
        assert difference(own.moments(x, mirror=mirror), whole) < 1e-11
        assert max(held) == most
        assert sum(held) == len(x)


@pytest.mark.parametrize("name", ["conv2d", "conv2d without bias", "conv2d in groups"])
def test_a_convolution_is_a_linear_layer_on_unfolded_patches(name: str) -> None:
    module, own, x = _case(name)
    how = {key: getattr(module, key) for key in ("stride", "padding", "dilation")}
    unfolded = F.unfold(x, module.kernel_size, **how)  # (N, channels * kernel, positions)
    patches = unfolded.mT.reshape(-1, module.groups, own.fan_in)
    for group in range(module.groups):
        assert torch.equal(own.rows(x)[group], patches[:, group])
        linear = nn.Linear(own.fan_in, own.units // module.groups, bias=module.bias is not None).double()
        linear.weight.data.copy_(own.matrix(module.weight)[group])
        if module.bias is not None:
            linear.bias.data.copy_(module.bias.view(module.groups, -1)[group])
        of_conv, of_linear = own.moments(x), layer_map(linear).moments(patches[:, group])
        assert difference([of_conv.inner[group]], of_linear.inner) < 1e-12
        assert difference([of_conv.sums[group]], of_linear.sums) < 1e-12
        out = own.positions(module(x))[group]
        assert difference([linear(patches[:, group])], [out]) < 1e-12


def test_inputs_of_any_memory_layout() -> None:
    for name in ("linear", "linear of tokens", "conv2d in groups", "conv2d reflect"):
        module, own, x = _case(name)
        g, _ = _loss_gradients(module, x)
        forms = [x.transpose(0, -1).contiguous().transpose(0, -1)]
        forms += [x.to(memory_format=torch.channels_last)] if x.ndim == 4 else []
        for form in forms:
            assert not form.is_contiguous()
            assert difference(own.moments(own.prepare(form)), own.moments(own.prepare(x))) < 1e-12
            ours, expected = (torch.zeros_like(module.weight) for _ in range(2))
            with torch.no_grad():
                own.add_gradients(own.prepare(form), g.to(memory_format=torch.preserve_format), ours, None, 1.0)
                own.add_gradients(own.prepare(x), g, expected, None, 1.0)
            assert difference([ours], [expected]) < 1e-12
    linear = nn.Linear(3, 2).double()
    own, x = layer_map(linear), torch.randn(1, 3, dtype=torch.float64).expand(4, 3)
    assert difference(own.moments(x), moments(x.contiguous().unsqueeze(0))) < 1e-12


WEIGHTS: dict[str, tuple[nn.Module, str]] = {
    "wide": (nn.Linear(12, 5), "weight"),
    "tall": (nn.Linear(3, 10), "weight"),
    "square": (nn.Linear(8, 8), "weight"),
    "a unit": (nn.Linear(6, 1), "weight"),
    "an input": (nn.Linear(1, 6), "weight"),
    "bias": (nn.Linear(4, 7), "bias"),
    "bfloat16": (nn.Linear(7, 6).bfloat16(), "weight"),
    "conv2d": (nn.Conv2d(3, 4, 2), "weight"),
    "channels last": (nn.Conv2d(3, 4, 2), "weight"),
    "channels last in 3-D": (nn.Conv3d(2, 4, 2), "weight"),
    "embedding": (nn.Embedding(9, 4), "weight"),
    "transposed": (nn.Linear(5, 9), "weight"),
    "a part of a buffer": (nn.Linear(5, 4), "weight"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_written_past_torch_to_a_row_or_a_column_is_noticed(name: str) -> None:
    module, which = WEIGHTS[name]
    p = module.get_parameter(which)
    if name == "transposed":
        p.data = p.data.t().contiguous().t()
    elif name == "channels last":
        p.data = p.data.to(memory_format=torch.channels_last)
    elif name == "channels last in 3-D":
        p.data = p.data.to(memory_format=torch.channels_last_3d)
    elif name == "a part of a buffer":
        p.data = torch.randn(4, 7)[:, 1:6]
    matrix = p.data.reshape(len(p), -1)
    own, before = layer_map(module), layer_map(module).state()
    for dim in (0, 1):
        for i in range(matrix.shape[dim]):
            kept = p.detach().clone()
            changed = matrix.clone()
            changed.select(dim, i).add_(1)
            p.data.copy_(changed.view(p.shape))
            assert own.state() != before
            p.data.copy_(kept)
            assert own.state() == before
