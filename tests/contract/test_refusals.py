"""Models, optimizers and batches that no rule can train are refused in words of ours; how rules show themselves."""

from __future__ import annotations

import copy
import os
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ADAM, CE, equal, mlp
from torch import Tensor, nn
from torch import distributed as dist

import beyondprop
from beyondprop import (
    AffineProjection,
    AltMin,
    Backprop,
    LearningRule,
    LocoProp,
    NonFiniteError,
    OnlineEWC,
    UnsupportedModelError,
)
from beyondprop.lab import registry

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
TOKENS = torch.arange(72).view(12, 6) % 7
OURS = Path(beyondprop.__file__).parent
every_rule = pytest.mark.parametrize("name", registry.rules.names())
AUTOGRAD = ("adam", "sgd", "sgd-decay")


def build(name: str, model: nn.Module) -> LearningRule:
    torch.manual_seed(2)
    spec = registry.rules.get(name)
    return spec.build(model, CE, spec.lr)


class Pair(nn.Module):
    def __init__(self, form: type = tuple) -> None:
        super().__init__()
        self.inner, self.form = mlp(6, 5, 3), form

    def forward(self, x: Tensor) -> Any:
        z = self.inner(x)
        return {"logits": z} if self.form is dict else self.form([z, z])


def refused(run: Callable[[], object], message: str, error: type[Exception] = UnsupportedModelError) -> None:
    with pytest.raises(error, match=message) as seen:
        run()
    assert OURS in Path(traceback.extract_tb(seen.value.__traceback__)[-1].filename).parents


@every_rule
@pytest.mark.parametrize("form", [tuple, list, dict])
def test_a_model_that_returns_no_tensor(name: str, form: type) -> None:
    model = Pair(form)
    before = copy.deepcopy(model.state_dict())
    by_autograd = isinstance(build(name, mlp(6, 5, 3)), Backprop)
    message = rf"Pair returns a {form.__name__}; .*Wrap it" if by_autograd else "Pair has a forward pass of its own"
    refused(lambda: build(name, model).step(X, Y), message)
    assert equal(before, model.state_dict())


@every_rule
def test_a_sparse_embedding(name: str) -> None:
    table = nn.Embedding(7, 4, sparse=True)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(24, 3))
    if name in ("sgd", "sgd-decay"):  # which take sparse gradients
        rows = table.weight.detach().clone()
        build(name, model).step(TOKENS, Y)
        assert not torch.equal(rows, table.weight)
        return
    before = copy.deepcopy(model.state_dict())
    message = {
        "adam": r"gradient of '0\.weight' is sparse, and Adam takes dense ones\. Pass torch\.optim\.SparseAdam",
    }.get(name, r"Layer '0' is an Embedding with sparse.*(sparse=False|build it without)")
    refused(lambda: build(name, model).step(TOKENS, Y), message)
    assert equal(before, model.state_dict())


def test_a_sparse_embedding_that_is_frozen_is_no_matter() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    AltMin(model, CE).step(TOKENS, Y)


def test_sparse_gradients_have_their_optimizer() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten())
    rule = Backprop(model, nn.MSELoss(), partial(torch.optim.SparseAdam, lr=0.1))
    rule.step(TOKENS, torch.zeros(12, 24))


@every_rule
def test_a_lazy_layer(name: str) -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3))
    if name in AUTOGRAD:  # which need no shapes
        rule = build(name, model)
        saved = rule.state_dict()
        rule.load_state_dict(saved)
        rule.step(X, Y)
        assert rule.state_dict()["shapes"][0] == [5, 6]
        with pytest.raises(ValueError, match=r"parameters of shapes \[None, (None, )?\[3, 5\]"):
            rule.load_state_dict(saved)
        return
    refused(lambda: build(name, model), r"'0(\.weight)?' is lazy.*: run one batch through the model first")


@pytest.fixture
def mesh() -> Iterator[Any]:
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # pyright: ignore[reportPrivateImportUsage]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@every_rule
def test_sharded_layers(name: str, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = mlp(6, 5, 3)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    if name in AUTOGRAD:
        build(name, model).step(X, Y)
        return
    message = "has a weight of type DTensor" if isinstance(build(name, mlp(6, 5, 3)), Backprop) else "is a DTensor"
    refused(lambda: build(name, model), rf"'0(\.weight)?' {message}.*(whole weights|exclude=)")


@every_rule
@pytest.mark.parametrize("steps", [0, 2])
def test_a_batch_of_padding(name: str, steps: int) -> None:
    rule = build(name, mlp(6, 5, 3))
    for _ in range(steps):
        rule.step(X, Y)
    before = copy.deepcopy(rule.model.state_dict())
    if rule.whole_set:
        message = "keeps codes for the data set" if steps else "y has labels -100 to -100"
        refused(lambda: rule.step(X, torch.full_like(Y, -100)), message, ValueError)
    else:
        message = "all labels are -100, and where the loss ignores that one.* Leave such a batch out"
        refused(lambda: rule.step(X, torch.full_like(Y, -100)), message, NonFiniteError)
    assert equal(before, rule.model.state_dict())


def test_padding_of_another_number_and_losses_that_are_nan_otherwise() -> None:
    rule = Backprop(mlp(6, 5, 3), nn.CrossEntropyLoss(ignore_index=2), ADAM)
    with pytest.raises(NonFiniteError, match="all labels are 2, and"):
        rule.step(X, torch.full_like(Y, 2))
    nan = Backprop(mlp(6, 5, 3), lambda z, y: z.sum() * float("nan"), ADAM)
    with pytest.raises(NonFiniteError, match=r"^(Stage '\d'|The loss) is not finite at step 1 \(loss nan\)"):
        nan.step(X, torch.full_like(Y, 2))


LBFGS: dict[str, Callable[[nn.Module], Any]] = {
    "Backprop": lambda m: Backprop(m, CE, torch.optim.LBFGS),
    "Backprop of an optimizer": lambda m: Backprop(m, CE, torch.optim.LBFGS(m.parameters())),
    "AltMin": lambda m: AltMin(m, CE, torch.optim.LBFGS),
    "EWC": lambda m: OnlineEWC(m, CE, torch.optim.LBFGS).step(X, Y),
    "base": lambda m: LocoProp(nn.Sequential(m, nn.LayerNorm(3)), base=torch.optim.LBFGS),
    "local": lambda m: LocoProp(m, local_optimizer=torch.optim.LBFGS),
}


@pytest.mark.parametrize("name", LBFGS)
def test_an_optimizer_that_needs_a_closure(name: str) -> None:
    model = mlp(6, 5, 3)
    before = copy.deepcopy(model.state_dict())
    refused(lambda: LBFGS[name](model), "step takes no closure, got LBFGS", TypeError)
    assert equal(before, model.state_dict())


@every_rule
def test_a_rule_shows_its_class_its_settings_and_its_model(name: str) -> None:
    rule = build(name, mlp(6, 5, 3))
    text = repr(rule)
    assert re.fullmatch(rf"{type(rule).__name__}\(model=Sequential, loss=CrossEntropyLoss, .*\)", text), text
    assert " at 0x" not in text
    for optimizer in rule.optimizers:
        assert f"{type(optimizer).__name__}(lr={optimizer.param_groups[0]['lr']:.4g}" in text
    twin = copy.deepcopy(rule)
    rule.step(X, Y)
    assert repr(rule) == repr(twin) == text


def test_what_is_shown() -> None:
    model = mlp(6, 5, 3)
    projection = AffineProjection(model, damping=0.5, rows=3)
    assert repr(projection) == (
        "AffineProjection(Sequential with 2 layers, damping=0.5, reduction='mean', side='smaller', rows=3, forgetting=1.0, "
        "refresh=1, nonfinite='raise')"
    )
    rule = Backprop(model, nn.functional.cross_entropy, partial(torch.optim.SGD, lr=0.1), preconditioner=projection)
    assert repr(rule) == (
        f"Backprop(model=Sequential, loss=cross_entropy, preconditioner={projection!r}, optimizers=[SGD(lr=0.1)])"
    )
    plain = AltMin(mlp(6, 5, 3), CE, damping=0.25, mu=0.5)
    assert "credit=Codes(solver=FittedLineSearch(refit=20), damping=0.25, mu=0.5, " in repr(plain)
    assert "solver=Descent(local_steps=1), optimizers=[Adam(lr=" in repr(plain)
    assert "LocoProp (\nParameter Group 0" in repr(LocoProp(model))
    assert os.linesep not in repr(plain)
