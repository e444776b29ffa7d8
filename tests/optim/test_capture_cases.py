"""Rare uses of LocoProp and AffineProjection: each takes the step of its plain twin, or is refused by name."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Branch, Functional, blobs, convnet, difference, equal, images, mlp, state
from local_runs import RUNS, Run, every_run, update
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from beyondprop import AffineProjection, LocoProp, NonFiniteError, UnsupportedModelError

D = torch.float64
CE = nn.CrossEntropyLoss()
X, Y = blobs(12, dtype=D)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(6, 8, 3, activation="tanh").double()


def _step(model: nn.Module, run: Run, x: Any = X, y: Tensor = Y) -> None:
    CE(model(x), y).backward()
    update(model, run)


def _refused(model: nn.Module, run: Run, message: str) -> None:
    """`step` raises and changes nothing."""
    before = state(model)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(UnsupportedModelError, match=message):
        run.step()
    assert equal(before, state(model))
    assert equal(gradients, [p.grad for p in model.parameters()])


class Repeated(nn.Module):
    """A layer that is called four times, within checkpoints unless `reentrant` is None."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def block(self, h: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(h)))

    def forward(self, x: Tensor) -> Tensor:
        h: Any = self.first(x)
        for _ in range(2):
            h = self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.out(h)


# A reentrant checkpoint shows the graph in pieces, which a transfer function cannot always be read from.
@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [(k, r) for k in RUNS for r in (False, True) if r is False or k not in ("matching", "quadratic")],
)
def test_a_shared_layer_in_a_checkpoint_has_all_its_calls(kind: str, reentrant: bool) -> None:
    moved = []
    for how in (None, reentrant):
        torch.manual_seed(3)
        model = Repeated(how).double()
        run = RUNS[kind](model)
        CE(model(X), Y).backward()
        assert [len(unit.calls) for unit in run._capture.units] == [1, 4, 1]
        update(model, run)
        moved.append(state(model))
    assert difference(moved[0].values(), moved[1].values()) < 1e-12


@every_run
def test_an_input_that_was_written_over_is_refused(kind: str) -> None:
    model = _net()
    run = RUNS[kind](model)
    buffer = torch.empty(6, 6, dtype=D)
    for x, y in zip(X.split(6), Y.split(6), strict=True):
        (CE(model(buffer.copy_(x)), y) / 2).backward()
    _refused(model, run, "The input of layer '0' was written over between the forward pass and step")
    model.zero_grad()
    _step(model, run, buffer.copy_(X[:6]), Y[:6])  # one pass a step is enough time to use it again


def test_a_state_of_another_loss_brings_its_transfer_functions() -> None:
    trained, model = _net(), _net()
    first, optimizer = LocoProp(trained, loss="matching"), LocoProp(model, loss="squared")
    optimizer.load_state_dict(first.state_dict())
    assert [group["loss"] for group in optimizer.param_groups] == ["matching", "matching"]
    _step(trained, first)
    _step(model, optimizer)
    assert optimizer.transfers == {"0": "tanh", "2": "softmax"}
    assert difference(model.parameters(), trained.parameters()) < 1e-12


@every_run
@pytest.mark.parametrize("frozen", ["0", "0.bias", "0.weight"])
def test_what_is_thawed_later_is_trained(kind: str, frozen: str) -> None:
    model, twin = _net(), _net()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    run, other = RUNS[kind](model), RUNS[kind](twin)
    model.requires_grad_(True)
    start = state(model)
    for m, own in ((model, run), (twin, other)):
        _step(m, own)
    assert difference(model.parameters(), twin.parameters()) < 1e-12
    assert all(difference([p], [start[n]]) > 1e-6 for n, p in model.named_parameters())


@every_run
def test_a_layer_that_is_pruned_later_is_refused(kind: str) -> None:
    model = _net()
    run = RUNS[kind](model)
    prune.identity(model[0], "weight")
    CE(model(X), Y).backward()
    _refused(model, run, "The weight of layer '0' is no longer the parameter .* pruned or parametrized")


@every_run
def test_a_skipped_batch_whose_gradients_were_set_to_zero_is_forgotten(kind: str) -> None:
    model, twin = _net(), _net()
    run, other = RUNS[kind](model), RUNS[kind](twin)
    CE(model(3 * X), Y).backward()
    model.zero_grad(set_to_none=False)
    for m, own in ((model, run), (twin, other)):
        _step(m, own)
    assert difference(model.parameters(), twin.parameters()) < 1e-12


# torch's compiler looks at tensors between two pieces of a graph, and warns itself of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_transfer_function_inside_compiled_code_has_to_be_named() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Functional().double()
    plain, named = copy.deepcopy(model), copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = LocoProp(compiled, lr=1e-3)
    CE(compiled(X), Y).backward()
    _refused(
        model, optimizer, r"follows the layers \['a'\] is inside compiled code. Name it, .*transfer=\{'a': 'relu'\}"
    )
    compiled = torch.compile(named, backend="aot_eager")
    optimizer = LocoProp(compiled, lr=1e-3, transfer={"a": "tanh"})
    _step(compiled, optimizer)
    _step(plain, LocoProp(plain, lr=1e-3))
    assert optimizer.transfers == {"a": "tanh", "b": "softmax"}
    assert difference(named.parameters(), plain.parameters()) < 1e-12


class Sharing(nn.Module):
    """Takes its input alone or in a dict, and calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, batch: Tensor | dict[str, Tensor]) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("kind", ["smaller", "inputs", "samples"])
@pytest.mark.parametrize("as_keyword", [False, True])
def test_samples_are_counted_in_inputs_of_any_form(kind: str, as_keyword: bool) -> None:
    torch.manual_seed(0)
    model = Sharing().double()
    twin = copy.deepcopy(model)
    run, other = RUNS[kind](model), RUNS[kind](twin)
    _step(twin, other)
    CE(model(batch={"x": X}) if as_keyword else model({"x": X}), Y).backward()
    update(model, run)
    assert difference(model.parameters(), twin.parameters()) < 1e-12


@pytest.mark.parametrize("kind", ["smaller", "inputs", "samples"])
def test_samples_of_layers_that_are_called_themselves_are_their_own(kind: str) -> None:
    model, twin = _net(), _net()
    run, other = RUNS[kind](model), RUNS[kind](twin)
    model(X[:3])  # never differentiated
    CE(model[2](model[1](model[0](X))), Y).backward()
    update(model, run)
    _step(twin, other)
    assert difference(model.parameters(), twin.parameters()) < 1e-12


@pytest.mark.parametrize("part", ["real", "imag"])
def test_a_complex_gradient_of_the_base_that_is_not_finite_is_refused(part: str) -> None:
    model = _net()
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    phase: Any = model.phase
    optimizer = LocoProp(model, base=partial(SGD, lr=0.1))
    (CE(model(X), Y) + phase.abs().sum()).backward()
    getattr(phase.grad, part).fill_(float("nan"))
    before = state(model)
    with pytest.raises(NonFiniteError, match="The gradient of 'phase' is not finite"):
        optimizer.step()
    assert equal(before, state(model))


class Saved:
    """A tensor that autograd has saved, for as long as its graph is there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _graphs(run: Callable[[], Any]) -> int:
    """Return how many saved tensors are left of what `run` does."""
    saved: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        packed = Saved(tensor.detach())  # an output would keep its own graph
        saved.append(weakref.ref(packed))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        run()
    assert saved
    return sum(ref() is not None for ref in saved)


def test_passes_without_a_backward_keep_no_graph() -> None:
    model = _net()
    optimizer = LocoProp(model)
    for _ in range(3):
        assert _graphs(lambda: model(X)) == 0
    assert _graphs(lambda: _step(model, optimizer)) == 0
    assert optimizer.transfers == {"0": "tanh", "2": "softmax"}


def test_a_backward_pass_that_is_broken_off_keeps_its_graph_until_the_next_one_at_most() -> None:
    model = _net()
    optimizer = LocoProp(model)

    def broken() -> None:
        out = model[:2](X)
        out.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            CE(model[2](out), Y).backward()

    _graphs(broken)
    model.zero_grad()
    assert _graphs(lambda: _step(model, optimizer)) == 0
    assert optimizer._reader._users == {}
    assert optimizer.transfers == {"0": "tanh", "2": "softmax"}


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aside = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.aside(h)
        return self.b(h)


def test_a_layer_whose_output_is_not_used_keeps_no_graph() -> None:
    model = Unused().double()
    optimizer = LocoProp(model)
    before = state(model.aside)
    for _ in range(3):
        optimizer.zero_grad()
        assert _graphs(lambda: CE(model(X), Y).backward()) == 0
        optimizer.step()
    assert optimizer.transfers == {"a": "tanh", "b": "softmax"}
    assert equal(before, state(model.aside))


def test_an_unrelated_view_that_autograd_has_lost_track_of_does_no_harm() -> None:
    whole = torch.randn(6, requires_grad=True) * 1
    parts = list(whole.chunk(2))
    whole.mul_(2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        _ = parts[0].grad_fn
    model = _net()
    optimizer = LocoProp(model)
    failed = ""
    try:
        _step(model, optimizer)
    except RuntimeError as error:
        failed = str(error)
    parts.clear()  # a report of this failure would look at them
    assert failed == ""
    assert optimizer.transfers == {"0": "tanh", "2": "softmax"}


@every_run
def test_a_branch_that_was_not_taken_stays_with_gradients_of_zero(kind: str) -> None:
    model = Branch().double()
    run = RUNS[kind](model)
    for way in ("left", "right", "left"):
        before = state(model)
        model.way = way
        model.zero_grad(set_to_none=False)
        _step(model, run)
        moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        assert moved == {"inner", way}


@pytest.mark.parametrize("kind", ["matching", "smaller"])
def test_a_sparse_embedding_that_is_excluded_is_the_optimizers(kind: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)).double()
    more = {"base": partial(SGD, lr=0.1)} if kind == "matching" else {}
    run = RUNS[kind](model, exclude=["0"], **more)
    before = state(model)
    CE(model(torch.tensor([[0, 1], [2, 3], [3, 1], [2, 2]])), torch.tensor([0, 1, 2, 0])).backward()
    gradient: Any = model[0].weight.grad
    expected = before["0.weight"] - 0.1 * gradient.to_dense()
    update(model, run)
    torch.testing.assert_close(model[0].weight, expected)
    assert not torch.equal(before["2.weight"], state(model)["2.weight"])


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor, named: bool = True) -> Tensor:
        return self.a(input=x) if named else self.a(x)


@every_run
def test_a_layer_may_be_called_by_keyword(kind: str) -> None:
    model = ByKeyword().double()
    twin = copy.deepcopy(model)
    run, other = RUNS[kind](model), RUNS[kind](twin)
    _step(model, run)
    CE(twin(X, named=False), Y).backward()
    update(twin, other)
    assert difference(model.parameters(), twin.parameters()) < 1e-12


@every_run
def test_a_convolution_takes_a_batch_without_samples(kind: str) -> None:
    model = convnet().double()
    run = RUNS[kind](model)
    before = state(model)
    x, y = images(1, D)
    nn.CrossEntropyLoss(reduction="sum")(model(x[:0]), y[:0]).backward()
    update(model, run)
    assert equal(before, state(model))


def test_running_moments_are_restored_from_a_state() -> None:
    model = _net()
    run = AffineProjection(model, forgetting=0.5, refresh=2)
    _step(model, run)
    twin = copy.deepcopy(model)
    other = AffineProjection(twin, forgetting=0.5, refresh=2)
    other.load_state_dict(copy.deepcopy(run.state_dict()))
    for x, y in ((2 * X, Y), (X - 1, Y), (X, Y)):
        for m, own in ((model, run), (twin, other)):
            m.zero_grad()
            _step(m, own, x, y)
        assert equal(state(model), state(twin))
    assert equal(run.state_dict(), other.state_dict())


def test_a_kept_inverse_follows_the_models_dtype() -> None:
    model = _net().float()
    run = AffineProjection(model, forgetting=0.5, refresh=4)
    _step(model, run, X.float())
    model.zero_grad()
    model.double()
    before = state(model)
    _step(model, run)
    assert all(p.grad is not None and p.grad.dtype is D for p in model.parameters())
    assert difference(before.values(), model.parameters()) > 1e-6


def test_a_base_that_needs_a_closure_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3))
    with pytest.raises(TypeError, match="base must return a torch optimizer whose step takes no closure, got LBFGS"):
        LocoProp(model, base=torch.optim.LBFGS)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_local_optimizer_of_two_groups_is_refused() -> None:
    def two(parameters: Iterable[nn.Parameter], lr: float) -> SGD:
        return SGD([{"params": [p]} for p in parameters], lr=lr)

    with pytest.raises(ValueError, match=r"one parameter group, got 2; settings of single layers go into layers="):
        LocoProp(_net(), local_optimizer=two)


def test_an_optimizer_is_not_pickled() -> None:
    with pytest.raises(
        TypeError, match="A LocoProp cannot be pickled, because its hooks are on its model; save its state_"
    ):
        pickle.dumps(LocoProp(_net()))
    with pytest.raises(TypeError, match=r"hooks on a model cannot be pickled; save its state_dict\(\)"):
        pickle.dumps(AffineProjection(_net()))
