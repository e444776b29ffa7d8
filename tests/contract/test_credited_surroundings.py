"""What people put around, into and onto a `Credited`: it works and equals, or it is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CE, Residual, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from beyondprop import (
    AltMin,
    Codes,
    Credit,
    CreditBlock,
    Credited,
    DifferenceTargetPropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    UnsupportedModelError,
)

CREDITS: dict[str, Callable[[], Credit]] = {
    "am": Codes,
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "dtp": lambda: DifferenceTargetPropagation(noise=0.0),
}
every_credit = pytest.mark.parametrize("credit", list(CREDITS))
X, Y = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)), torch.arange(12) % 3


def _net(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(
        nn.Linear(6, 8), *norms, nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    ).double()  # fmt: skip


def _made(credit: str, net: nn.Module | None = None) -> Credited:
    return Credited(net or _net(), CREDITS[credit](), CE)


def _gradients(called: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    CE(called(X), Y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _same(found: list[Tensor], right: list[Tensor]) -> None:
    assert len(found) == len(right)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


# ---- what works ----------------------------------------------------------------------------------------------------------


@every_credit
def test_a_copy_of_a_trained_one_goes_on_alike(credit: str) -> None:
    model = _made(credit)
    _gradients(model, model)
    again = copy.deepcopy(model)
    _same(_gradients(again, again), _gradients(model, model))
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert all(bool(p.any()) for name, p in model.named_parameters() if name.endswith("weight"))


@every_credit
def test_moving_averages_are_those_of_all_weights_and_train_nothing(credit: str) -> None:
    model = _made(credit, _net(norm=True))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    first = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    _gradients(model, model)
    optimizer.step()
    averaged.update_parameters(model)
    for p, before, now in zip(averaged.module.parameters(), first, model.parameters(), strict=True):
        torch.testing.assert_close(p, 0.75 * before + 0.25 * now, rtol=0, atol=1e-15)
    update_bn([X], averaged)
    net: Any = averaged.module.model
    hidden = net[0](X).detach()
    torch.testing.assert_close(net[1].running_mean, hidden.mean(0), rtol=0, atol=1e-14)


@every_credit
def test_sharpness_aware_steps_take_the_deltas_where_they_look(credit: str) -> None:
    """Two backward passes a step: the second, at weights moved for a while, is a fresh one's there."""
    model = _made(credit)
    start = [p.detach().clone() for p in model.parameters()]
    uphill = _gradients(model, model)
    with torch.no_grad():
        for p, g in zip(model.parameters(), uphill, strict=True):
            p.add_(g, alpha=0.05)
    found = _gradients(model, model)
    fresh = _made(credit)
    fresh.load_state_dict(model.state_dict())
    _same(found, _gradients(fresh, fresh))
    with torch.no_grad():
        for p, before in zip(model.parameters(), start, strict=True):
            p.copy_(before)
    once = _made(credit)
    _same(_gradients(model, model), _gradients(once, once))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # the input requires no gradient
@every_credit
def test_hooks_on_it_and_on_its_parameters_see_the_credits_gradients(credit: str) -> None:
    blocks = [] if credit == "dtp" else [Residual(6).double()]  # which autograd differentiates inside
    right = _gradients(model := _made(credit, nn.Sequential(*copy.deepcopy(blocks), *_net())), model)
    model, seen = _made(credit, nn.Sequential(*blocks, *_net())), []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    model.register_full_backward_hook(lambda *_: seen.append("backward"))
    for p in model.parameters():
        p.register_hook(lambda g: g * 2)
        p.register_post_accumulate_grad_hook(lambda _: seen.append("ready"))
    _same([g / 2 for g in _gradients(model, model)], right)
    counts = {what: seen.count(what) for what in seen}
    assert counts == {"before": 1, "after": 1, "backward": 1, "ready": len(right)}


@every_credit
def test_hooks_inside_fire_where_they_were_put_before(credit: str) -> None:
    if credit == "dtp":
        pytest.skip("no inverse of a stage with hooks by default")
    net, seen = _net(), []
    net[2].register_forward_hook(lambda *_: seen.append("inside"))
    _same(_gradients(model := _made(credit, net), model), _gradients(other := _made(credit), other))
    assert seen


@every_credit
def test_offloaded_to_where_they_are(credit: str) -> None:
    with torch.autograd.graph.save_on_cpu():
        found = _gradients(model := _made(credit), model)
    _same(found, _gradients(other := _made(credit), other))


@pytest.mark.parametrize("credit", ["am", "dfa"])
def test_parametrized_layers_are_trained(credit: str) -> None:
    def net() -> nn.Sequential:
        made = _net()
        parametrizations.weight_norm(made[2])
        return made

    plain = net()
    CE(plain(X), Y).backward()
    model = Credited(net(), Codes("gradient") if credit == "am" else CREDITS[credit](), CE)
    found = _gradients(model, model)
    if credit == "am":
        _same(found, [p.grad for p in plain.parameters() if p.grad is not None])
    assert all(bool(g.any()) for g in found)


# ---- what is refused -----------------------------------------------------------------------------------------------------


@every_credit
def test_copies_for_several_devices_are_refused(credit: str) -> None:
    """`nn.DataParallel` on one device calls the module itself; on several, it makes these copies of every module."""
    model = _made(credit)
    _same(_gradients(nn.DataParallel(model), model), _gradients(other := _made(credit), other))
    with pytest.raises(UnsupportedModelError, match=r"nn.DataParallel copies a module.*use DistributedDataParallel"):
        model._replicate_for_data_parallel()


def _pruned_block() -> Callable[[Tensor], Tensor]:
    block = CreditBlock(nn.Linear(6, 3).double(), "am")
    prune.l1_unstructured(block, "weight", 0.5)
    return block


def _changed(change: Callable[[Any], object]) -> Callable[[], Credited]:
    def made() -> Credited:
        model = _made("fa")
        change(model.model)
        return model

    return made


LATER: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], str]] = {
    "parametrized": (_changed(lambda net: parametrizations.weight_norm(net[2])), r"'2.parametrizations'.* was added"),
    "pruned": (
        _changed(lambda net: prune.l1_unstructured(net[0], "weight", 0.5)),
        r"'0.weight_orig'.* was added.*pruning",
    ),
    "a pruned block": (_pruned_block, r"Parameter 'weight_orig' of this Linear was added.*pruning"),
    "assigned": (
        _changed(lambda net: net.load_state_dict(_net().state_dict(), assign=True)),
        r"'0.weight'.* was exchanged",
    ),
    "hooked": (_changed(lambda net: net[2].register_forward_hook(lambda *_: None)), "got a hook after"),
    "hooked at the root": (_changed(lambda net: net.register_forward_hook(lambda *_: None)), "got a hook after"),
}


@pytest.mark.parametrize("case", list(LATER))
def test_changes_after_it_was_built_are_refused(case: str) -> None:
    made, message = LATER[case]
    with pytest.raises(UnsupportedModelError, match=message):
        CE(made()(X), Y).backward()


def _parametrized() -> nn.Sequential:
    net = _net()
    parametrizations.weight_norm(net[2])
    return net


def _compiled() -> Any:
    return torch.compile(_net(), backend="eager")


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Residual(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x))


class _NoChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) + self.a(x) * self.b(x)


def _through_the_skip() -> object:
    model: Any = _Around()
    inner = model.block.inner
    return Credited(model, "am", CE, cuts=[inner[0], inner[1], inner[2], model.last])(X.float())


NEVER: dict[str, tuple[Callable[[], object], str]] = {
    "parametrized, feedback": (
        lambda: Credited(_parametrized(), "fa")(X),
        "'2'.* does not use ParametrizedLinear.weight as it is",
    ),
    "compiled": (
        lambda: _made("am", _compiled()),
        r"The model is wrapped \(OptimizedModule\).*give a credit to the module inside",
    ),
    "in a Credited": (
        lambda: Credited(nn.Sequential(CreditBlock(nn.Linear(6, 6), "fa"), nn.ReLU(), nn.Linear(6, 3)), "fa"),
        "has a Credited or CreditBlock inside",
    ),
    "in a block": (
        lambda: CreditBlock(nn.Sequential(_made("fa"), nn.ReLU(), nn.Linear(3, 3)), "fa"),
        "has a Credited or CreditBlock inside",
    ),
    "in a rule": (lambda: AltMin(_made("am"), CE), "a Credited has its credit; give a rule the module inside, `model`"),
    "no chain": (lambda: Credited(_NoChain(), "am", CE), r"has 1 stage\(s\).* branches around 'b', which is one block"),
    "a cut in a branch": (
        lambda: Credited(_Around(), "am", CE, cuts=["block.inner.0", "last"]),
        "cuts names 'block.inner.0', which is none of the model's modules: block, last",
    ),
    "a cut through a skip": (_through_the_skip, "do not compute what _Around computes"),
    "hooks at the root": (
        lambda: Credited(_changed(lambda net: net.register_forward_hook(lambda *_: None))().model, "fa"),
        "Sequential has hooks and cannot be cut",
    ),
    "traced": (lambda: torch.jit.trace(_made("am"), X, check_trace=False), "keeps plain gradients.*torch.no_grad"),
    "exported": (lambda: torch.export.export(_made("am"), (X,)), "keeps plain gradients.*torch.no_grad"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", list(NEVER))
def test_what_cannot_be_is_refused(case: str) -> None:
    made, message = NEVER[case]
    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        made()


def test_an_export_without_gradients_is_the_model() -> None:
    model = _made("am")
    with torch.no_grad():
        found = torch.export.export(model, (X,)).module()(X)
        assert torch.equal(found, model.model(X))


class _Silent(Credit):
    pass


def test_a_credit_without_a_way_down_is_refused() -> None:
    model = Credited(_net(), _Silent())
    with pytest.raises(NotImplementedError, match="_Silent writes neither `below` nor `assign`"):
        CE(model(X), Y).backward()


@every_credit
def test_copies_of_what_a_stage_saved_are_refused(credit: str) -> None:
    model = _made(credit)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        loss = CE(model(X), Y)
    with pytest.raises(
        UnsupportedModelError, match=r"Hooks on saved tensors gave stage '4' a copy.*Checkpoints.* work"
    ):
        loss.backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_derivatives_are_refused() -> None:
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        _made("am")(torch.autograd.forward_ad.make_dual(X, X))


@pytest.fixture
def mesh() -> Iterator[Any]:
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # pyright: ignore[reportPrivateImportUsage]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("where", ["outside", "inside", "one layer", "before", "around a block"])
def test_sharded_weights_are_refused(where: str, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    if where == "before":
        net = mlp(6, 5, 3)
        fully_shard(net, mesh=mesh)
        with pytest.raises(
            UnsupportedModelError, match=r"'0.weight' is a DTensor.*Use nn.parallel.DistributedDataParallel"
        ):
            Credited(net, "am", CE)
        return
    model: nn.Module = _made("am")
    if where == "around a block":
        model = nn.Sequential(nn.Linear(6, 6), CreditBlock(mlp(6, 5, 3), "am")).double()
        fully_shard(model, mesh=mesh)
    else:
        net: Any = model.model
        fully_shard({"outside": model, "inside": net, "one layer": net[0]}[where], mesh=mesh)
    with pytest.raises(UnsupportedModelError, match=r"Parameter '0.weight' .* was exchanged .*by sharding"):
        model(X)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # one process
def test_parts_of_one_buffer_are_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    del mesh
    model = FullyShardedDataParallel(_made("am"), device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"Parameter '_flat_param' .* was added .*by sharding"):
        model(X)
    with pytest.raises(UnsupportedModelError, match=r"The model is wrapped \(FullyShardedDataParallel\)"):
        Credited(FullyShardedDataParallel(_net(), device_id=torch.device("cpu")), "am", CE)
