"""What people put around, into and onto reversible chains: it works and equals the stored mode."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from chains import TIGHT, chain, conv, every_coupling, every_mode, far, images, in_mode, same_as_stored
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from beyondprop import UnsupportedModelError
from beyondprop.nn import AdditiveCoupling, ReversibleSequential

# ---- further arguments ---------------------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """A function of a stream, a mask, and what is handed on in a dict."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(3, outputs), nn.Linear(2, outputs)

    def forward(self, x: Tensor, mask: Tensor, *, given: dict[str, Any], power: int = 1) -> Tensor:
        out = torch.tanh(self.inner(x) + self.shift(given["c"])) ** power
        return out.masked_fill(mask, 0.0) + sum(t for t in given["more"] if t is not None)


@every_mode
def test_masks_and_conditions_go_to_every_function_and_get_gradients(mode: str) -> None:
    torch.manual_seed(0)
    model = ReversibleSequential(*(AdditiveCoupling(Conditioned(), Conditioned()) for _ in range(3)), split_dim=-1)
    x, c = torch.randn(4, 6).double(), torch.randn(4, 2).double()
    # A gradient of the condition that is the cotangent itself, and one that is summed over the batch.
    more = [torch.randn(4, 3).double().requires_grad_(), None, torch.randn(3).double().requires_grad_()]
    mask = torch.randn(4, 3) > 0.5

    found = {}
    for way in ("store", mode):
        copied, leaf, start = in_mode(model.double(), way), c.clone().requires_grad_(), x.clone().requires_grad_()
        value = copied(start, mask, given={"c": leaf * 2, "more": more}, power=3).square().sum()
        found[way] = torch.autograd.grad(value, [start, leaf, more[0], more[2], *copied.parameters()])
    assert far(found[mode], found["store"]) < TIGHT


@every_mode
def test_an_argument_with_a_gradient_where_no_weight_has_one(mode: str) -> None:
    model = ReversibleSequential(AdditiveCoupling(Conditioned(), Conditioned()), split_dim=-1).requires_grad_(False)
    c, mask = torch.randn(4, 2, requires_grad=True), torch.zeros(4, 3, dtype=torch.bool)
    model.mode = mode
    (found,) = torch.autograd.grad(model(torch.randn(4, 6), mask, given={"c": c, "more": []}).sum(), c)
    assert bool(found.any())


# ---- hooks ---------------------------------------------------------------------------------------------------------------


@every_mode
def test_hooks_on_parameters_and_on_the_chain_fire_once(mode: str) -> None:
    model, x, seen = chain(), images(), []
    model.mode = mode
    right = torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])
    weight = model[1].f[2].weight
    weight.register_hook(lambda g: seen.append("weight") or g * 2)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x.register_hook(lambda g: seen.append("input"))
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    model.register_full_backward_hook(lambda *_: seen.append("backward"))
    model(x).square().mean().backward()
    assert sorted(seen) == sorted(["before", "after", "weight", "accumulated", "input", "backward"])
    found = [x.grad, *(p.grad if p is not weight else p.grad / 2 for p in model.parameters())]
    assert far(found, right) < 1e-14


@every_mode
def test_hooks_on_functions_fire_in_both_runs_and_see_the_same(mode: str) -> None:
    model, seen = chain(), []
    model.mode = mode
    model[1].f.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(images()).square().mean().backward()
    (first, out), (again, same) = seen
    assert far([again, same], [first, out]) < 1e-12


@every_mode
def test_what_a_function_was_given_and_keeps_stays_what_it_was(mode: str) -> None:
    """Streams are not changed under those who hold them."""
    model, held = chain(), []
    model.mode = mode
    for block in model:
        for f in (block.f, block.g):
            f.register_forward_hook(lambda m, args, out: held.append((args[0], args[0].detach().clone())))
            f.register_full_backward_hook(lambda m, below, above: held.append((above[0], above[0].clone())))
            f.register_full_backward_hook(lambda m, below, above: held.append((below[0], below[0].clone())))
    model(images()).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in held)


# ---- loops ---------------------------------------------------------------------------------------------------------------


@every_mode
def test_accumulation(mode: str) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for _ in range(2):
            model(x.detach() * 2).sin().mean().backward()
        return model(x).square().mean()

    same_as_stored(chain(dropout=0.3), mode, loss)


@every_mode
def test_two_passes_before_one_backward(mode: str) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) * model(x.flip(0)).tanh()).mean()

    same_as_stored(chain(dropout=0.3), mode, loss)


@every_mode
def test_a_chain_behind_a_chain_and_one_inside_another(mode: str) -> None:
    inside = nn.Sequential(chain("affine", 2, dropout=0.2), nn.Conv2d(8, 8, 1))
    outer = ReversibleSequential(AdditiveCoupling(inside, conv(8)), AdditiveCoupling(conv(8), nn.Identity()))
    behind = chain("momentum")
    for block in behind:
        block.f[0], block.f[2] = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), outer, behind, nn.Conv2d(16, 2, 1))
    same_as_stored(model.double(), mode)


@every_mode
def test_gradient_scaling_with_half_precision(mode: str) -> None:
    model = chain().float()
    found = {}
    for way in ("store", mode):
        copied, x = in_mode(model, way), images(torch.float32)
        optimizer, scaler = torch.optim.SGD(copied.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                value = copied(x).square().mean()
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(copied.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        found[way] = [p.detach() for p in copied.parameters()]
    assert far(found[mode], found["store"]) < 1e-5


@every_mode
def test_a_checkpoint_around_it(mode: str) -> None:
    for reentrant in (False, True):

        def loss(model: nn.Module, x: Tensor, reentrant: bool = reentrant) -> Tensor:
            return checkpoint(model, x, use_reentrant=reentrant).square().mean()

        same_as_stored(chain(dropout=0.3), mode, loss)


@every_mode
def test_a_checkpoint_inside_it(mode: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=False)

    model = chain(norm=False, dropout=0.3)
    for block in model:
        block.f = Checkpointed(block.f)
    same_as_stored(model, mode)


@every_mode
def test_offloaded_to_where_they_are(mode: str) -> None:
    model, x = chain(dropout=0.3), images()
    found = {}
    for way in ("store", mode):
        copied = in_mode(model, way)
        torch.manual_seed(1)
        with torch.autograd.graph.save_on_cpu():
            value = copied(x).square().mean()
        found[way] = torch.autograd.grad(value, [x, *copied.parameters()])
    assert far(found[mode], found["store"]) < TIGHT


@every_mode
def test_compiled_around_the_chain(mode: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 8, 1), chain(dropout=0.2), nn.Conv2d(8, 2, 1)).double(), images()
    found = {}
    for compiles in (False, True):
        copied = in_mode(model, mode)
        called: Any = torch.compile(copied, backend="aot_eager") if compiles else copied
        for _ in range(2):
            torch.manual_seed(1)
            found[compiles] = torch.autograd.grad(called(x).square().mean(), [x, *copied.parameters()])
    torch._dynamo.reset()
    assert far(found[True], found[False]) < TIGHT


# ---- copies --------------------------------------------------------------------------------------------------------------


@every_coupling
def test_copies_train_alike_and_apart(kind: str) -> None:
    model = chain(kind, dropout=0.2)
    model.check, model.exact_bits = 1.0, None
    model(images()).sum().backward()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.mode == model.mode
        found = []
        for one in (model, again):
            torch.manual_seed(1)
            found.append(torch.autograd.grad(one(images()).square().mean(), [*one.parameters()]))
        assert far(*found) == 0
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
    assert all(bool(p.any()) for name, p in model.named_parameters() if name.endswith("weight"))


def test_names_of_weights_are_those_of_a_sequential_in_every_mode() -> None:
    model = chain()
    names = list(nn.Sequential(*model).state_dict())
    for mode in ("inverse", "checkpoint", "store"):
        assert list(in_mode(model, mode).state_dict()) == names
    again = chain()
    again.load_state_dict(nn.Sequential(*model).state_dict())
    assert len(again) == 4
    assert again[-1] is [*again][3]


@every_mode
def test_moving_averages(mode: str) -> None:
    model = in_mode(chain(), mode)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    first = [p.detach().clone() for p in model.parameters()]
    model(images()).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    averaged.update_parameters(model)
    for p, before, now in zip(averaged.module.parameters(), first, model.parameters(), strict=True):
        torch.testing.assert_close(p, 0.75 * before + 0.25 * now, rtol=0, atol=1e-15)


@every_mode
def test_weights_exchanged_before_the_backward_pass_are_those_of_the_forward_pass(mode: str) -> None:
    """As loops with a moving average do, which exchange weights for an evaluation."""
    model, x = in_mode(chain(), mode), images()
    right = torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])
    value = model(x).square().mean()
    for p in model.parameters():
        p.data = p.data * 2
    assert far(torch.autograd.grad(value, [x, *model.parameters()]), right) < 1e-14


# ---- memory, and what is left behind -------------------------------------------------------------------------------------


@every_mode
def test_an_output_that_is_dropped_frees_what_was_kept(mode: str) -> None:
    model = in_mode(chain(dropout=0.2), mode)
    gc.disable()
    try:
        y = model(images())
        kept = weakref.ref(y.grad_fn.way)
        del y
        assert kept() is None
        y = model(images())
        kept = weakref.ref(y.grad_fn.way)
        y.sum().backward()
        del y
        assert kept() is None
    finally:
        gc.enable()


class Failing(nn.Module):
    """Fails in the call of this number, once it has changed everything that it may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.left = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), -1
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.dropout(self.linear(self.norm(x)), 0.5)
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise KeyError("in a function")
        return out


@every_mode
def test_a_function_that_fails_on_the_way_back_leaves_everything_as_it_was(mode: str) -> None:
    model = in_mode(ReversibleSequential(*(AdditiveCoupling(Failing(), conv(4)) for _ in range(3))), mode)
    weights, failing = [*model.parameters()], model[1].f
    x = images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    model.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    failing.left = 1
    with pytest.raises(KeyError, match="in a function"):
        y.sum().backward(retain_graph=True)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in [x, *weights])
    first = torch.autograd.grad(y.sum(), weights, retain_graph=True)
    assert far(torch.autograd.grad(y.sum(), weights), first) == 0


@every_mode
def test_a_function_that_fails_forward_leaves_the_next_pass_right(mode: str) -> None:
    model = in_mode(ReversibleSequential(*(AdditiveCoupling(Failing(), conv(4)) for _ in range(3))).double(), mode)
    cached = torch.is_autocast_cache_enabled()
    model[2].f.left = 1
    with pytest.raises(KeyError, match="in a function"):
        model(images())
    assert torch.is_autocast_cache_enabled() == cached
    same_as_stored(model, mode)


# ---- ranks ---------------------------------------------------------------------------------------------------------------


def _trained(mode: str, rows: slice, wrap: bool) -> list[Tensor]:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), in_mode(chain(norm=False), mode)).double()
    called = DistributedDataParallel(model, bucket_cap_mb=1e-3) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.cat([images(grad=False), images(grad=False).flip(0)])
    for _ in range(3):
        optimizer.zero_grad()
        called(x[rows]).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def _on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for mode in ("inverse", "checkpoint"):
        torch.manual_seed(0)
        found[mode] = _trained(mode, slice(3 * rank, 3 * rank + 3), wrap=True)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_equals_one_process_on_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(_on_a_rank, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    torch.manual_seed(0)
    right = _trained("store", slice(None), wrap=False)
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt").values():
            assert far(found, right) < TIGHT


def test_copies_that_have_no_parameters_are_refused() -> None:
    replicate: Any = chain()._replicate_for_data_parallel
    with pytest.raises(UnsupportedModelError, match="DistributedDataParallel"):
        replicate()
