"""What users' loops do to the library: one test for each small program that was wrong once, as it was run.

The program's kind, and what else belongs to it, is tested where its files are:

    program                      what was wrong                                      the kind
    01 autocast around fit       21 rules trained on stale casts of the weights      contract/test_model_changes.py
    02 two arrivals              a hook that fires twice counted a batch twice       optim/test_passes.py
    03 ghost                     a new head was never trained                        contract/test_model_changes.py
    04 assign, thaw, freeze      weights were asked at construction only             contract/test_model_changes.py
    05 stale outputs             a gradient of zero moved weights                    optim/test_passes.py
    06 the first dimension       sequences counted as samples                        optim/test_sample_counts.py
    07 metrics                   what is kept for a metric decided the loss          optim/test_passes.py
    09 half precision            sums overflowed, a momentum never decayed           optim/test_half_precision.py,
                                                                                     optim/test_whole_updates.py
    10 losses                    targets broadcast, means over entries               stages/test_losses.py,
                                                                                     lab/training/test_training.py
    12 zero_grad in between      LocoProp-M became LocoProp-S                        optim/test_passes.py
    13 ranks                     processes drifted apart                             contract/test_ranks.py
    14 projection, autocast      rounding was taken for a changed gradient           optim/test_whole_updates.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import CE, blobs, digits, mlp, relative, state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beyondprop import (
    AffineProjection,
    AltMin,
    Backprop,
    LearningRule,
    LocoProp,
    OnlineEWC,
    UnsupportedModelError,
    evaluate,
    fit,
)
from beyondprop.optim import RMSProp

SGD = torch.optim.SGD


def _net(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    return mlp(*widths, activation="tanh")


def _moved(model: nn.Module, before: dict[str, Tensor]) -> list[bool]:
    return [not torch.equal(p, before[name]) for name, p in model.named_parameters()]


def _accuracy(model: nn.Module) -> float:
    return evaluate(model, (digits().x_test, digits().y_test), CE)["accuracy"]


def test_01_one_autocast_context_around_fit() -> None:
    found = []
    for is_on in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            history = fit(AltMin(model, CE), digits(), epochs=3, batch_size=50)
        found.append(_accuracy(model))
        assert history.evaluations[-1]["accuracy"] == pytest.approx(found[-1], abs=0.02)
    assert found[0] > 0.8
    assert found[1] == pytest.approx(found[0], abs=0.05)


def _saliency(a: Tensor, b: Tensor, x: Tensor) -> None:
    torch.autograd.grad(a, x, retain_graph=True)
    (a + b).backward()


def _two_passes(a: Tensor, b: Tensor, x: Tensor) -> None:
    a.backward(retain_graph=True)
    b.backward()


@pytest.mark.parametrize("kind", ["LocoProp", "AffineProjection"])
@pytest.mark.parametrize("passes", [_saliency, _two_passes])
def test_02_what_looks_and_what_comes_in_parts(kind: str, passes: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    x, y, t = torch.randn(32, 6), torch.arange(32) % 3, torch.randn(32, 3)

    def run(how: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
        model = _net(6, 5, 3)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        projects = kind == "AffineProjection"
        trained = AffineProjection(model) if projects else LocoProp(model, 1e-2, loss="squared", local_optimizer=SGD)
        looked_at = x.clone().requires_grad_()
        output = model(looked_at)
        how(F.cross_entropy(output, y), F.mse_loss(output, t), looked_at)
        trained.step()
        if projects:
            return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return nn.utils.parameters_to_vector(model.parameters()).detach() - before

    assert relative(run(passes), run(lambda a, b, _: (a + b).backward())) < 1e-5


def test_03_a_new_head_is_no_ghost() -> None:
    model, (x, y) = _net(6, 8, 8, 3), blobs(64)
    rule = AltMin(model, CE)
    rule.step(x, y)
    model[4] = nn.Linear(8, 3)
    with pytest.raises(UnsupportedModelError, match=r"Module '4' .* was exchanged .*build the rule anew"):
        rule.step(x, y)
    rule, before, expected = AltMin(model, CE), state(model), model(x)
    torch.testing.assert_close(rule.step(x, y).output, expected)
    assert all(_moved(model, before))


MAKES: dict[str, Callable[[nn.Module], LearningRule]] = {
    "Backprop": lambda m: Backprop(m, CE, torch.optim.Adam),
    "OnlineEWC": lambda m: OnlineEWC(m, CE),
    "AltMin": lambda m: AltMin(m, CE),
}


@pytest.mark.parametrize("name", list(MAKES))
def test_04_assigned_thawed_and_frozen_weights(name: str) -> None:
    x, y = blobs(64)
    model = _net(6, 8, 3)
    rule = MAKES[name](model)
    rule.step(x, y)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(UnsupportedModelError, match=r"Parameter '0\.weight' .* was exchanged"):
        rule.step(x, y)

    model = _net(6, 8, 3)
    model[0].requires_grad_(False)
    rule = MAKES[name](model)
    rule.step(x, y)
    model[0].requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=r"Parameter '0\.weight' was thawed"):
        rule.step(x, y)

    model = _net(6, 8, 3)
    rule = MAKES[name](model)
    rule.step(x, y)
    model[0].requires_grad_(False)
    before = state(model)
    for _ in range(30):
        rule.step(x, y)
    assert _moved(model, before) == [False, False, True, True]


@pytest.mark.parametrize("loss", ["squared", "matching", "quadratic"])
def test_05_a_gradient_of_zero_moves_nothing(loss: str) -> None:
    model = _net(6, 8, 3)
    optimizer = LocoProp(model, loss=loss, local_optimizer=SGD, lr=1e-2)
    (0 * model(torch.randn(32, 6)).square().sum()).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    before = state(model)
    optimizer.step()
    assert not any(_moved(model, before))


class _Sequences(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dim, self.inner, self.head = (1 if batch_first else 0), nn.Linear(6, 8), nn.Linear(8, 3)
        self.enc = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enc(self.inner(x)).mean(self.dim))


def test_06_the_first_dimension_of_sequence_first_nets_is_no_batch() -> None:
    x, y = torch.randn(32, 5, 6), torch.arange(32) % 3
    norms: list[dict[str, float]] = []
    for batch_first in (True, False):
        model = _Sequences(batch_first)
        projection = AffineProjection(model)
        for given in ({}, {"samples": 32}):
            model.zero_grad()
            F.cross_entropy(model(x if batch_first else x.transpose(0, 1)), y).backward()
            if batch_first or given:
                projection.step(**given)
                continue
            with pytest.raises(UnsupportedModelError, match="How many samples the loss averages over is doubtful"):
                projection.step()
        norms.append({name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None})
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_07_what_is_kept_for_a_metric_decides_nothing() -> None:
    model, (x, y) = _net(6, 8, 3), blobs(32)
    optimizer = LocoProp(model)
    output = model(x)
    kept = output.softmax(1)
    F.cross_entropy(output, y).backward()
    optimizer.step()
    assert optimizer.transfers == {"0": "tanh", "2": "softmax"}
    assert kept.requires_grad


def test_09_half_precision() -> None:
    layer = nn.Linear(6, 3).bfloat16()
    projection = AffineProjection(layer)
    layer(torch.randn(8, 6, dtype=torch.bfloat16)).sum().backward()
    projection.step()

    layer = nn.Linear(600, 600).half()
    optimizer, before = LocoProp(layer), state(layer)
    (layer(torch.ones(8, 600, dtype=torch.float16)).sum() / 8).backward()
    optimizer.step()
    assert all(_moved(layer, before))
    assert all(bool(p.isfinite().all()) for p in layer.parameters())

    q = nn.Parameter(torch.zeros(9, dtype=torch.bfloat16))
    rmsprop = RMSProp([q], lr=1e-3)
    q.grad = torch.ones_like(q)
    rmsprop.step()
    q.grad.zero_()
    momentum = float(rmsprop.state[q]["momentum_buffer"][0])
    for _ in range(2000):
        rmsprop.step()
    assert float(rmsprop.state[q]["momentum_buffer"][0]) / momentum == pytest.approx(0.999**2000, rel=0.02)

    rule = AltMin(_net(6, 4, 3).bfloat16(), CE, code_solver="exact")
    assert bool(rule.step(torch.randn(8, 6).bfloat16(), torch.arange(8) % 3).loss.isfinite())


def test_10_losses() -> None:
    x = torch.randn(3000, 5)
    flat, column = (
        SimpleNamespace(x_train=x, y_train=y, x_test=x[:500], y_test=y[:500]) for y in (2 * x[:, 0], 2 * x[:, :1])
    )
    rule = AltMin(_net(5, 16, 1), nn.SmoothL1Loss())
    with pytest.raises(ValueError, match=r"y has shape \(50,\), the output \(50, 1\)"):
        fit(rule, flat, epochs=1, batch_size=50)
    assert fit(rule, column, epochs=5, batch_size=50).evaluations[-1]["loss"] < 0.1

    model, kl = nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1)), nn.KLDivLoss(reduction="batchmean")
    t = torch.rand(3000, 3).softmax(1)
    right = float(kl(model(x), t).detach())
    assert evaluate(model, (x, t), kl)["loss"] == pytest.approx(right, rel=1e-5)
    stages = AltMin(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.LogSoftmax(1)), kl)
    stages.step(x, t)

    y = torch.arange(3000) % 3
    y[::3] = -100
    losses: list[Any] = [CE, lambda o, t: F.cross_entropy(o, t)]
    first, second = (evaluate(model, (x, y), loss)["accuracy"] for loss in losses)
    assert first == second


def test_12_zero_grad_between_forward_and_backward() -> None:
    model = _net(64, 64, 10)
    twin = _net(64, 64, 10)
    optimizers = [LocoProp(m, lr=3e-5) for m in (model, twin)]
    for _ in range(3):
        x, y = torch.randn(32, 64), torch.arange(32) % 10
        loss = F.cross_entropy(model(x), y)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizers[1].step()
    assert optimizers[0].transfers == {"0": "tanh", "2": "softmax"}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def _of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = blobs(50)
    x, y = x[rank::2], y[rank::2]
    inner = _net(6, 16, 3)
    wrapped = DistributedDataParallel(inner)
    optimizer = LocoProp(inner, lr=1e-2)
    for _ in range(4):
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(nn.utils.parameters_to_vector(inner.parameters()).detach(), f"{folder}/{rank}.pt")
    wrapped = DistributedDataParallel(_net(6, 16, 3))
    rule = AltMin(wrapped.module, CE)
    with pytest.raises(UnsupportedModelError, match=r"AltMin trains in 2 processes, .* weights would drift apart"):
        rule.step(x, y)
    dist.destroy_process_group()


def test_13_two_processes_with_the_inner_module_of_a_wrapper(tmp_path: Path) -> None:
    mp.spawn(_of_two, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert relative(first, nn.utils.parameters_to_vector(_net(6, 16, 3).parameters())) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_14_a_projection_under_autocast_accuses_nobody(seed: int) -> None:
    torch.manual_seed(seed)
    widths = (64, 64, 64, 10)
    model = nn.Sequential(nn.Flatten(), *_net(*widths))
    optimizer, projection = SGD(model.parameters(), lr=0.1, momentum=0.9), AffineProjection(model)
    for _ in range(60):
        rows = torch.randint(len(digits().x_train), (50,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(digits().x_train[rows]), digits().y_train[rows])
        loss.backward()
        projection.step()
        optimizer.step()
    assert _accuracy(model) > 0.8
