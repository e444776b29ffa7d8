"""What holds for every registered rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import blobs, convnet, equal, images, mixed, mlp, relative, rnn, rule_state, state, train
from torch import Tensor, nn

from beyondprop import AffineProjection, Backprop, LearningRule, LocoProp
from beyondprop.lab import registry

pytestmark = [
    pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning"),
    pytest.mark.filterwarnings("ignore:.*of the trainable weights are in no layer"),  # recurrent nets under LocoProp
]

NETS: dict[str, tuple[Callable[[], nn.Sequential], Callable[..., tuple[Tensor, Tensor]]]] = {
    "mlp": (mixed, blobs),
    "conv": (lambda: convnet(norm=True), images),
    "rnn": (rnn, images),
}

# For small nets and few steps. Random feedback takes a while until the weights have turned toward it.
RATES = {"sgd": 0.03, "sgd-decay": 0.03, "am-sgd": 0.03, "fa": 0.01, "dfa": 0.01}


def _rule(name: str, net: str = "mlp", **changes: Any) -> LearningRule:
    torch.manual_seed(2)
    spec = registry.rules.get(name)
    return spec.build(NETS[net][0](), nn.CrossEntropyLoss(), changes.get("lr", spec.lr))


def _batches(net: str = "mlp", count: int = 4, rows: int = 12) -> list[tuple[Tensor, Tensor]]:
    x, y = NETS[net][1](count * rows)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def _hooks(model: nn.Module) -> list[Any]:
    """All hooks on a model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]


def _captures(rule: LearningRule) -> bool:
    """Whether the optimizer of a rule, or what is in front of it, knows the backward pass from hooks of its own."""
    if not isinstance(rule, Backprop):
        return False
    return isinstance(rule.preconditioner, AffineProjection) or isinstance(rule.optimizers[0], LocoProp)


# Rules that keep codes for a whole set have a contract of their own, in test_offline.py.
every_rule = pytest.mark.parametrize("name", [n for n in registry.rules.names() if not registry.rules.get(n).whole_set])
every_net = pytest.mark.parametrize("net", ["mlp", "conv"])


@every_rule
@every_net
def test_the_loss_falls(name: str, net: str) -> None:
    rule = _rule(name, net, lr=RATES.get(name, registry.rules.get(name).lr))
    # The published code steps divide by the batch size, so that small batches make them too long.
    losses = train(rule, _batches(net, rows=48) * 20)
    assert sum(losses[-4:]) < 0.4 * sum(losses[:4])


@every_rule
def test_a_step_leaves_nothing_behind(name: str) -> None:
    rule = _rule(name)
    model = rule.model
    hooks = _hooks(model)
    flags = [p.requires_grad for p in model.parameters()]
    parameters = [id(p) for p in model.parameters()]
    rule.step(*_batches()[0])
    result = rule.step(*_batches()[1], diagnostics=True)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.is_leaf for p in model.parameters())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert parameters == [id(p) for p in model.parameters()]
    assert bool(hooks) == _captures(rule)  # an optimizer's stay from its construction on, nobody else has any
    left = _hooks(model)
    assert len(left) == len(hooks)
    assert all(new is old for new, old in zip(left, hooks, strict=True))
    tensors = [result.loss, result.output, *([] if result.energy is None else [result.energy])]
    tensors += [t for stage in result.stages.values() for t in stage.values()]
    assert not any(t.requires_grad for t in tensors)
    assert result.loss.ndim == 0
    assert result.output.shape == (12, 3)
    assert torch.is_grad_enabled()
    assert model.training


@every_rule
@every_net
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_a_restored_rule_goes_on_to_the_last_bit(name: str, net: str, how: str) -> None:
    rule = _rule(name, net)
    batches = _batches(net, 6)
    train(rule, batches[:3])
    if how == "deepcopy":
        other = copy.deepcopy(rule)
    else:
        other = _rule(name, net)
        saved = copy.deepcopy((rule.model.state_dict(), rule.state_dict()))
        other.model.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    losses = []
    for r in (rule, other):
        torch.manual_seed(7)
        losses.append(train(r, batches[3:]))
    assert losses[0] == losses[1]
    assert equal(rule_state(rule), rule_state(other))
    assert not any(p is q for p, q in zip(rule.model.parameters(), other.model.parameters(), strict=True))


@every_rule
def test_states_of_other_rules_are_refused(name: str) -> None:
    rule = _rule(name)
    with pytest.raises(ValueError, match="This state is of 'Other', this rule is"):
        rule.load_state_dict({**rule.state_dict(), "rule": "Other"})
    with pytest.raises(ValueError, match="optimizers, this rule has"):
        rule.load_state_dict({**rule.state_dict(), "optimizers": []})


@every_rule
def test_schedulers_change_the_update(name: str) -> None:
    x, y = _batches()[0]
    moved = []
    for factor in (1.0, 0.5):
        # Later local steps see what the earlier ones did, so that only small steps are proportional to their rate.
        torch.manual_seed(2)
        rule = registry.rules.get(name).build(
            mixed().double(), nn.CrossEntropyLoss(), 1e-4 * registry.rules.get(name).lr
        )
        schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step, f=factor: f) for o in rule.optimizers]
        before = state(rule.model)
        torch.manual_seed(3)
        rule.step(x.double(), y)
        for scheduler in schedulers:
            scheduler.step()
        moved.append({n: p.detach() - before[n] for n, p in rule.model.named_parameters() if p.ndim > 1})
    for n in moved[0]:
        assert bool(moved[0][n].any())
        assert relative(moved[1][n], 0.5 * moved[0][n]) < 1e-4, n


@every_rule
def test_one_sample_and_a_ragged_last_batch(name: str) -> None:
    spec = registry.rules.get(name)
    rule = spec.build(mlp(6, 8, 8, 3, activation="tanh"), nn.CrossEntropyLoss(), 0.01)
    x, y = blobs(8)
    for rows in (1, 5, 1, 2):
        before = state(rule.model)
        assert torch.isfinite(rule.step(x[:rows], y[:rows]).loss)
        assert not equal(before, state(rule.model))


@every_rule
@pytest.mark.parametrize("loss", [nn.SmoothL1Loss(), lambda o, t: (o - t).square().mean()], ids=["module", "function"])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_broadcast_are_refused_and_nothing_changes(name: str, loss: Any) -> None:
    rule = registry.rules.get(name).build(mlp(6, 8, 8, 1, activation="tanh"), loss, 0.01)
    x, y = blobs(8)[0], torch.randn(8)
    before = state(rule.model)
    with pytest.raises(ValueError, match=r"y has shape \(8,\), the output \(8, 1\)"):
        rule.step(x, y)
    assert equal(before, state(rule.model))
    assert torch.isfinite(rule.step(x, y[:, None]).loss)


@every_rule
@every_net
def test_float32_agrees_with_float64(name: str, net: str) -> None:
    fine, coarse = _rule(name, net).model.double(), _rule(name, net).model
    spec = registry.rules.get(name)
    rules = [spec.build(m, nn.CrossEntropyLoss(), 1e-2 if "mem" not in name else 0.1) for m in (fine, coarse)]
    for module in (*fine.modules(), *coarse.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks are drawn per dtype
    x, y = _batches(net)[0]
    # One backward: gradients before Adam's division, which magnifies rounding without bound.
    for rule, value in zip(rules, (x.double(), x), strict=True):
        rule.backward(value, y)
    for p, q in zip(coarse.parameters(), fine.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        scale = float(q.grad.abs().max())
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-3 * scale + 1e-6)


@every_rule
@every_net
def test_a_seed_repeats_and_another_differs(name: str, net: str) -> None:
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        rule = registry.rules.get(name).build(NETS[net][0](), nn.CrossEntropyLoss(), registry.rules.get(name).lr)
        train(rule, _batches(net))
        runs.append(state(rule.model))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


@every_rule
def test_eval_mode_is_respected(name: str) -> None:
    rule = _rule(name)
    rule.model.eval()
    x, y = _batches()[0]
    expected = rule.model(x).detach()
    statistics = [b.clone() for b in rule.model.buffers()]
    result = rule.step(x, y)
    torch.testing.assert_close(result.output, expected)  # no mask, running statistics used
    assert all(torch.equal(b, s) for b, s in zip(rule.model.buffers(), statistics, strict=True))
    assert not any(m.training for m in rule.model.modules())


@every_rule
def test_the_model_stays_the_users(name: str) -> None:
    rule = _rule(name)
    x, y = _batches()[0]
    rule.step(x, y)
    before = rule.model.eval()(x)
    rule.model.train()
    train(rule, _batches() * 2)
    assert not torch.equal(rule.model.eval()(x), before)  # an ordinary forward pass sees the training
    loss = nn.functional.cross_entropy(rule.model(x), y)
    loss.backward()
    assert all(p.grad is not None for p in rule.model.parameters())


@every_rule
def test_clipping_between_backward_and_update(name: str) -> None:
    rule = _rule(name)
    x, y = _batches()[0]
    rule.backward(x, y)
    norm = torch.nn.utils.clip_grad_norm_(rule.model.parameters(), 1e-12)
    assert float(norm) > 1e-6
    if name in ("sgd", "am-sgd"):
        before = state(rule.model)
        rule.update()
        moved = [float((p.detach() - before[n]).abs().max()) for n, p in rule.model.named_parameters()]
        assert max(moved) < 1e-6
    else:
        rule.update()
    assert all(p.grad is None for p in rule.model.parameters())


@every_rule
@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.filterwarnings("ignore:.* of the weights have no memory")
def test_autocast(name: str, net: str) -> None:
    batches = _batches(net)
    lr = RATES[name] if name in ("fa", "dfa") else registry.rules.get(name).lr
    whole, half = _rule(name, net, lr=lr), _rule(name, net, lr=lr)
    for module in (*whole.model.modules(), *half.model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole.backward(*batches[0])
    with torch.autocast("cpu", torch.bfloat16):
        half.backward(*batches[0])
    for p, q in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.dtype == torch.float32
        if p.ndim > 1:
            assert float((p.grad - q.grad).norm() / q.grad.norm()) < 0.15
    for rule in (whole, half):
        rule.discard()
    losses = []
    for batch in batches * 15:
        with torch.autocast("cpu", torch.bfloat16):
            losses += train(half, [batch])
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@every_rule
def test_to_the_same_device_changes_nothing(name: str) -> None:
    rule = _rule(name)
    train(rule, _batches()[:2])
    before = rule_state(rule)
    assert rule.to("cpu") is rule
    assert equal(before, rule_state(rule))
    rule.step(*_batches()[2])


@every_rule
@every_net
@pytest.mark.cuda
def test_on_a_cuda_device(name: str, net: str) -> None:
    rule = _rule(name, net)
    batches = _batches(net)
    train(rule, batches[:2])
    twin = copy.deepcopy(rule).to("cuda")
    cuda = [(x.cuda(), y.cuda()) for x, y in batches]
    for r, data in ((rule, batches), (twin, cuda)):
        for module in r.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        r.backward(*data[2])
    for p, q in zip(rule.model.parameters(), twin.model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-3, atol=1e-5)
    twin.discard()
    norms = [m for m in twin.model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    seen = [int(m.num_batches_tracked) for m in norms]  # type: ignore[arg-type]
    assert train(twin, cuda * 8)[-1] < 1.5
    assert [int(m.num_batches_tracked) for m in norms] == [s + 32 for s in seen]  # type: ignore[arg-type]
    assert twin.to("cpu") is twin
    twin.step(*batches[0])
