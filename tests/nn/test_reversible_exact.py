"""Rounding: exact mode, the warning, what is measured, and what is kept."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import pytest
import torch
from chains import TIGHT, conv, every_mode, far, images, in_mode
from torch import Tensor, nn

from beyondprop import UnsupportedModelError
from beyondprop.errors import ReconstructionWarning
from beyondprop.nn import (
    AdditiveCoupling,
    MomentumCoupling,
    Recomputed,
    ReversibleSequential,
    gradient_angle,
    reconstruction_error,
)


def deep(depth: int, *, norm: bool = True, gain: float = 1.0, channels: int = 4, **options: Any) -> Any:
    """A chain in float32."""
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(conv(channels, norm=norm), conv(channels, norm=norm)) for _ in range(depth)]
    with torch.no_grad():
        for block in blocks:
            for p in block.parameters():
                p.mul_(gain)
    return ReversibleSequential(*blocks, **options)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


# ---- exact mode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_reconstruction_is_exact_at_depth_256(training: bool, layout: torch.memory_format) -> None:
    model, x = deep(256, exact_bits=12), torch.randn(2, 8, 4, 4).to(memory_format=layout)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(x)  # whose statistics are those of eval()
    model.train(training)
    assert reconstruction_error(model, x) == 0.0
    assert gradient_angle(model, mean_square, x) < 2e-5


def test_without_a_grid_it_is_not() -> None:
    assert 1e-7 < reconstruction_error(deep(64), torch.randn(2, 8, 4, 4)) < 1e-3


def test_reconstruction_is_exact_under_dropout_autocast_and_for_pairs() -> None:
    torch.manual_seed(0)
    model = ReversibleSequential(
        *(AdditiveCoupling(conv(4, dropout=0.3), conv(4, dropout=0.3)) for _ in range(32)), exact_bits=10
    )
    x = torch.randn(4, 8, 6, 6)
    assert reconstruction_error(model, x) == 0.0
    assert reconstruction_error(model, (x[:, :4], x[:, 4:])) == 0.0
    with torch.autocast("cpu", torch.bfloat16):
        assert reconstruction_error(model, x) == 0.0


@every_mode
def test_exact_modes_gradient_is_that_of_the_rounded_net(mode: str) -> None:
    found: dict[str, Any] = {}
    for way in ("store", mode):
        model, x = in_mode(deep(6, exact_bits=8), way), images(torch.float32)
        y = model(x)
        assert torch.equal(y, (y * 256).round() / 256)
        found[way] = [y.detach(), *torch.autograd.grad(mean_square(y), [x, *model.parameters()])]
    assert torch.equal(found[mode][0], found["store"][0])
    assert far(found[mode], found["store"]) < 1e-6


def test_rounding_by_hand() -> None:
    f, g = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.randn(5, 4)

    def q(t: Tensor) -> Tensor:
        return torch.round(t * 16) / 16

    x1, x2 = q(x).chunk(2, 1)
    y1 = x1 + q(f(x2))
    y2 = x2 + q(g(y1))
    model = ReversibleSequential(AdditiveCoupling(f, g), exact_bits=4)
    assert torch.equal(model(x), torch.cat((y1, y2), 1))
    with torch.no_grad():
        assert torch.equal(model(x), torch.cat((y1, y2), 1))


@pytest.mark.parametrize("mode", ["inverse", "checkpoint", "store"])
def test_what_leaves_the_exact_range_is_refused_by_name(mode: str) -> None:
    model = in_mode(deep(8, norm=False, exact_bits=16), mode)
    assert model(torch.randn(2, 8, 4, 4)).isfinite().all()
    with torch.no_grad():
        model[5].g[1].bias.fill_(300.0)
    with pytest.raises(
        UnsupportedModelError, match=r"Block '5' of the chain reached 3\d\d, and sums are exact below 256"
    ):
        model(torch.randn(2, 8, 4, 4))
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="Block '5' of the chain reached"):
        model(torch.randn(2, 8, 4, 4))
    with pytest.raises(UnsupportedModelError, match="The input of the chain reached 1e"):
        model(torch.full((2, 8, 4, 4), 1e4))
    with pytest.raises(UnsupportedModelError, match="The input of the chain reached nan"):
        model(torch.full((2, 8, 4, 4), torch.nan))


def test_exact_mode_is_for_blocks_that_add() -> None:
    model = ReversibleSequential(MomentumCoupling(conv(4)), exact_bits=8)
    with pytest.raises(UnsupportedModelError, match="AdditiveCoupling; block '0' is a MomentumCoupling"):
        model(images(torch.float32))


# ---- streams -------------------------------------------------------------------------------------------------------------


def test_half_precision_without_autocast_has_streams_in_float32() -> None:
    """A whole net in bfloat16: functions and what comes behind get bfloat16, sums do not."""
    model, seen = deep(24).bfloat16(), []
    model[3].f.register_forward_hook(lambda m, args, out: seen.append(args[0].dtype))
    x = images(torch.bfloat16)
    y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}
    model.stream_dtype = None
    model.mode = "store"
    assert model(x).dtype == torch.bfloat16


def test_what_float32_streams_are_for() -> None:
    # Under autocast: reconstruction with streams in float32 is far better than in bfloat16.
    x = torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        fine = reconstruction_error(deep(16), x.bfloat16())
        coarse = reconstruction_error(deep(16, stream_dtype=None), x.bfloat16())
    assert fine < 1e-5
    assert coarse > 1e-3


# ---- the warning ---------------------------------------------------------------------------------------------------------


def _step(model: nn.Module, x: Tensor, times: int = 1) -> None:
    for _ in range(times):
        mean_square(model(x)).backward()


def test_a_deep_chain_without_normalisation_warns_before_training_is_ruined() -> None:
    model, x = deep(256, norm=False, gain=3.0, check=1e-2), torch.randn(2, 8, 4, 4)
    with pytest.warns(ReconstructionWarning, match=r"The input of block '0' was reconstructed with .*check=0\.01"):
        _step(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(model, x, times=9)
    with pytest.warns(ReconstructionWarning, match="The input of block '128' was"):
        _step(model, x)


def test_a_normalised_chain_does_not_warn_and_every_block_is_looked_at() -> None:
    model, x, looked = deep(4, check=1e-4), torch.randn(2, 8, 4, 4), []
    for _ in range(31):
        y = model(x)
        looked.append(y.grad_fn.way.probe)
        y.sum().backward()
    assert [block for block in looked if block is not None] == [0, 2, 1, 3]
    assert [n for n, block in enumerate(looked) if block is not None] == [0, 10, 20, 30]


def test_a_block_is_named_once() -> None:
    model, x = deep(2, check=1e-12), torch.randn(2, 8, 4, 4)
    with pytest.warns(ReconstructionWarning) as caught:
        _step(model, x, times=41)
    assert [str(w.message)[:24] for w in caught] == ["The input of block '0' w", "The input of block '1' w"]


def test_the_warning_names_the_measured_error() -> None:
    """A block whose reconstruction is off by a known amount: another weight, hidden from the version counter."""
    model, x = deep(4, norm=False, check=1e-3), torch.randn(2, 8, 4, 4)
    y = model(x)
    way = y.grad_fn.way
    way.weights._norms = None
    before = model[0].f[1].bias.detach().clone()
    model[0].f[1].bias.data = before
    way.weights.tensors[[id(p) for p in model.parameters()].index(id(model[0].f[1].bias))].data.add_(1.0)
    off = x[:, :4].numel() ** 0.5 / float(x.norm())
    with pytest.warns(ReconstructionWarning) as caught:
        y.sum().backward()
    text = str(caught[0].message)
    assert f"a relative error of {off:.2g}, above" in text


# ---- measures ------------------------------------------------------------------------------------------------------------


def test_measures_leave_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), deep(4), deep(2, mode="store"))
    x = images(torch.float32, grad=False)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    error = reconstruction_error(model, x)
    angle = gradient_angle(model, mean_square, x)
    assert 0 < error < 1e-5
    assert 0 <= angle < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [model[1].mode, model[2].mode] == ["inverse", "store"]
    assert model[1].counters == {"kept_bytes": 0}
    assert all(p.grad is None for p in model.parameters())
    assert not model[1]._forward_hooks


def test_measures_of_a_chain_that_is_called_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = deep(4)

        def forward(self, x: Tensor) -> Any:
            return self.chain(x=x)

    model, x = Named(), torch.randn(2, 8, 4, 4)
    assert reconstruction_error(model, x) == reconstruction_error(model.chain, x) > 0


def test_measures_see_what_is_wrong() -> None:
    model, x = deep(16, norm=False, gain=3.0), torch.randn(2, 8, 4, 4)
    assert reconstruction_error(model, x) > 1e-2
    assert gradient_angle(model, mean_square, x) > 1.0
    with pytest.raises(UnsupportedModelError, match="Sequential has no ReversibleSequential inside"):
        reconstruction_error(nn.Sequential(nn.Linear(2, 2)), x)
    with pytest.raises(UnsupportedModelError, match="no parameter that requires a gradient"):
        gradient_angle(deep(2).requires_grad_(False), mean_square, x)


# ---- what is kept --------------------------------------------------------------------------------------------------------


def _kept(model: Any, x: Any) -> float:
    _step(model, x)
    return model.counters["kept_bytes"]


def test_bytes_kept_do_not_grow_with_depth() -> None:
    x = torch.randn(4, 8, 16, 16)
    # A norm for each of 8 weights a block, by which a change is seen.
    sizes = [_kept(deep(depth), x) for depth in (4, 16, 64)]
    assert sizes == [x.nbytes + 64 * depth for depth in (4, 16, 64)]
    sizes = [_kept(in_mode(deep(depth), "checkpoint"), x) for depth in (4, 16, 64)]
    assert sizes == [x.nbytes * (depth + 1) + 64 * depth for depth in (4, 16, 64)]
    four, sixteen = (_kept(in_mode(deep(depth), "store"), x) for depth in (4, 16))
    assert sixteen > 3.9 * four > 3.9 * 8 * x.nbytes


def test_bytes_kept_are_those_that_are_alive() -> None:
    """Counted from outside: all tensors that there are after the forward pass and were not before."""
    x = torch.randn(4, 8, 16, 16)
    for mode in ("inverse", "checkpoint"):
        model = in_mode(deep(16), mode)
        before = _alive()
        y = model(x)
        found = sum(_alive().values()) - sum(before.values())
        assert abs(found - model.counters["kept_bytes"]) < 0.02 * found
        del y


def _alive() -> dict[int, int]:
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_random_states_and_changed_buffers_are_counted() -> None:
    x = torch.randn(4, 8, 16, 16)
    model = ReversibleSequential(AdditiveCoupling(conv(4, dropout=0.5), conv(4)))
    assert _kept(model, x) == x.nbytes + torch.get_rng_state().nbytes + 64
    model = ReversibleSequential(AdditiveCoupling(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), conv(4)))
    vectors = sum(b.nbytes for name, b in model.named_buffers() if name.endswith(("_u", "_v")))
    assert vectors
    assert _kept(model, x) == x.nbytes + vectors + 48


def test_a_pass_without_gradients_keeps_the_number() -> None:
    model, x = deep(2), torch.randn(4, 8, 16, 16)
    assert _kept(model, x) == x.nbytes + 128
    with torch.no_grad():
        model(x[:1])
    assert model.counters["kept_bytes"] == x.nbytes + 128


def test_stored_bytes_are_unknown_where_other_hooks_take_the_tensors() -> None:
    model, x = in_mode(deep(2), "store"), torch.randn(4, 8, 16, 16)
    with torch.autograd.graph.save_on_cpu():
        model(x)
    assert math.isnan(model.counters["kept_bytes"])
    assert _kept(model, x) > 4 * x.nbytes
    assert _kept(model, x) > 4 * x.nbytes  # and what was counted once stays known
    assert _kept(model, x[:1]) < 4 * x.nbytes


# ---- Recomputed ----------------------------------------------------------------------------------------------------------


class Both(nn.Module):
    """Two tensors in, two out, with everything that a second run could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.3)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, scale: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x) * scale, self.b(x).masked_fill(mask, 0.0)


def test_recomputed_modules_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    mask = torch.randn(3, 4, 5, 5) > 0
    found: dict[str, Any] = {}
    counted: list[Any] = []
    for mode in ("store", "checkpoint"):
        torch.manual_seed(0)
        module: Any = Recomputed(Both().double(), mode=mode)
        x, scale = images(), torch.rand(8, 1, 1).double().requires_grad_()
        torch.manual_seed(1)
        first, second = module(x, scale, mask=mask)
        module.eval()
        value = first.square().mean() + second.sin().mean()
        state = torch.get_rng_state()
        gradients = torch.autograd.grad(value, [x, scale, *module.parameters()], retain_graph=True)
        assert far(torch.autograd.grad(value, [x, scale, *module.parameters()]), gradients) == 0
        assert torch.equal(torch.get_rng_state(), state)
        only = torch.autograd.grad(module(x, scale, mask=mask)[1].sum(), [*module.parameters()], allow_unused=True)
        counted.append(module.module.a[1].num_batches_tracked)
        found[mode] = [value.detach(), *gradients, *only, *(b for b in module.buffers() if b.is_floating_point())]
    assert [*map(int, counted)] == [1, 1]
    assert far(found["checkpoint"], found["store"]) < TIGHT


def test_recomputed_modules_keep_their_input_alone() -> None:
    x = images(torch.float32)
    module = Recomputed(nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(9))))
    module(x).sum().backward()
    assert module.counters == {"kept_bytes": x.nbytes + 18 * 8}
    with torch.no_grad():
        assert not module(x).requires_grad
    assert torch.equal(Recomputed(nn.Identity())(x), x)
    same = Recomputed(nn.Flatten())(x)
    same.sum().backward()
    assert same.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_recomputed_modules_under_autocast() -> None:
    found: dict[str, Any] = {}
    for mode in ("store", "checkpoint"):
        torch.manual_seed(0)
        module, x = (
            Recomputed(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), mode=mode),
            images(torch.float32),
        )
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        found[mode] = torch.autograd.grad(y.float().square().mean(), [x, *module.parameters()])
    assert far(found["checkpoint"], found["store"]) < 1e-6
