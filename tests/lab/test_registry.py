"""The table of rules, and rules from outside the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import mlp
from torch import nn

from beyondprop import (
    ADMM,
    BCD,
    MAC,
    AltMin,
    Backprop,
    DifferenceTargetProp,
    LocalRule,
    Memory,
    OfflineAltMin,
    RuleSpec,
    register,
)
from beyondprop.lab import registry

PLUGIN = '''
"""Sign-symmetric feedback: wishes go down through the signs of the weights (Liao et al., AAAI 2016)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from beyondprop import Assignment, Credit, Descent, LocalRule, RuleSpec, register
from beyondprop.solvers.descent import adam


class SignSymmetry(Credit):
    def assign(self, trace, loss) -> Iterator[Assignment]:
        delta = -loss.cotangent
        for index in range(len(trace.pullbacks) - 1, trace.lowest, -1):
            stage = trace[index]
            weight = stage.stage.weight
            below = delta @ weight.sign() * weight.abs().mean()
            if stage.stage.activation is not None:
                below = below * stage.slope
            yield Assignment(index, stage, delta, below, loss if index == len(trace.pullbacks) - 1 else None)
            delta = below
        yield Assignment(trace.lowest, trace[trace.lowest], delta, None)


register(
    RuleSpec(
        "sign-symmetry", "Sign symmetry", "feedback through signs", "Liao et al., 2016",
        lambda model, loss, lr: LocalRule(model, loss, SignSymmetry(), Descent(adam(lr))), lr=3e-3, grid=(1e-3, 3e-3),
    )
)
'''

TOY_RULE = '''
"""A rule of its own kind: weight perturbation."""

from __future__ import annotations

import torch

from beyondprop import LearningRule, RuleSpec, StepResult, register


class Perturbation(LearningRule):
    def __init__(self, model, loss, lr):
        super().__init__(model, loss)
        self.optimizers = (torch.optim.SGD(model.parameters(), lr=lr),)

    @torch.no_grad()
    def backward(self, x, y, *, scale=1.0, diagnostics=False):
        output = self.model(x)
        value = self.loss(output, y)
        noise = [torch.randn_like(p) for p in self.model.parameters()]
        for p, n in zip(self.model.parameters(), noise):
            p.add_(n, alpha=1e-3)
        slope = (self.loss(self.model(x), y) - value) / 1e-3
        for p, n in zip(self.model.parameters(), noise):
            p.sub_(n, alpha=1e-3)
            p.grad = slope * n * scale
        return StepResult(value, output)


register(RuleSpec("perturb", "Weight perturbation", "toy", "-", Perturbation, lr=1e-2, grid=(1e-2,)))
'''


@pytest.fixture(autouse=True)
def _restored_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.rules.names()  # what is built in, too
    monkeypatch.setattr(registry.rules, "rows", dict(registry.rules.rows))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))
    monkeypatch.setattr(registry, "_files", dict(registry._files))
    modules = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(modules):
        if "plugin" in name or name in ("sign_symmetry", "perturb"):
            del sys.modules[name]


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(classes)


def test_a_credit_rule_from_outside_learns_digits(tmp_path: Path) -> None:
    path = tmp_path / "sign_symmetry.py"
    path.write_text(PLUGIN, encoding="utf-8")
    registry.load_plugins([str(path)])
    assert "sign-symmetry" in registry.rules.names()
    model = mlp(64, 64, 32, 10)
    rule = registry.rules.get("sign-symmetry").build(model, nn.CrossEntropyLoss(), 3e-3)
    x, y = _digits()
    for _ in range(12):
        for rows in torch.randperm(1400).split(100):
            rule.step(x[rows], y[rows])
    accuracy = float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())
    assert accuracy > 0.88


def test_a_rule_of_its_own_kind_from_outside_steps(tmp_path: Path) -> None:
    path = tmp_path / "perturb.py"
    path.write_text(TOY_RULE, encoding="utf-8")
    registry.load_plugins([str(path)])
    rule = registry.rules.get("perturb").build(mlp(64, 10), nn.CrossEntropyLoss(), 1e-2)
    x, y = _digits()
    losses = [float(rule.step(x, y).loss) for _ in range(60)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in rule.model.parameters())


def test_a_plugin_by_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_plugin_package.py").write_text(TOY_RULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.load_plugins(["a_plugin_package"])
    assert "perturb" in registry.rules.names()


def test_a_plugin_does_not_take_another_modules_place(tmp_path: Path) -> None:
    import colorsys

    path = tmp_path / "colorsys.py"
    path.write_text(TOY_RULE, encoding="utf-8")
    try:
        registry.load_plugins([str(path)])
        assert sys.modules["colorsys"] is colorsys
    finally:
        sys.modules["colorsys"] = colorsys


def test_plugins_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"no file .*missing.py: a .py file or the dotted name"):
        registry.load_plugins([str(tmp_path / "missing.py")])
    with pytest.raises(ImportError, match="no_such_module_anywhere"):
        registry.load_plugins(["no_such_module_anywhere"])


def test_names_are_unique_and_known() -> None:
    spec = registry.rules.get("adam")
    with pytest.raises(ValueError, match=r"A rule named 'adam' is registered already.*replace=True"):
        register(spec)
    other = replace(spec, title="Mine")
    assert register(other, replace=True) is other
    assert registry.rules.get("adam").title == "Mine"
    with pytest.raises(ValueError, match=r"rule must be one of 'am-adam', .*got 'adma'"):
        registry.rules.get("adma")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a=b", "a:b", "a,b"])
def test_names_that_cannot_be_typed(name: str) -> None:
    with pytest.raises(ValueError, match="name must be a word without spaces"):
        replace(registry.rules.get("adam"), name=name)


def test_specs_have_sane_rates() -> None:
    with pytest.raises(ValueError, match="lr must be a finite number > 0"):
        replace(registry.rules.get("adam"), lr=0.0)
    for name in registry.rules.names():
        spec: RuleSpec = registry.rules.get(name)
        assert spec.lr in spec.grid
        assert spec.title
        assert spec.summary
        assert spec.source
    sizes = {len(registry.rules.get(name).grid) for name in registry.rules.names()}
    assert sizes == {4}  # the same budget for every rule


def test_the_named_rules_are_what_their_names_say() -> None:
    built = {
        n: registry.rules.get(n).build(mlp(6, 5, 4, 3), nn.CrossEntropyLoss(), 0.25) for n in registry.rules.names()
    }
    for name, rule in built.items():
        assert rule.whole_set == registry.rules.get(name).whole_set
        if rule.whole_set:
            continue
        kinds = {"fa": LocalRule, "dfa": LocalRule, "dtp": DifferenceTargetProp}
        assert isinstance(rule, AltMin if name.startswith("am") else kinds.get(name, Backprop))
        rates = [o.param_groups[0]["lr"] for o in rule.optimizers]
        assert 0.25 in rates, name  # the rate that is asked for is the rate that is used
    offline, mac, bcd, admm = (built[n] for n in ("offline-am", "mac", "bcd", "admm"))
    assert isinstance(offline, OfflineAltMin)
    assert isinstance(mac, MAC)
    assert isinstance(bcd, BCD)
    assert isinstance(admm, ADMM)
    assert (offline.mu, mac.mu, bcd.gamma, bcd.rho, bcd.alpha, admm.beta, admm.gamma) == (4, 4, 4, 4, 5, 4, 40)
    assert (bcd.output_loss.name, admm.output_loss.name) == ("squared", "hinge")
    memory = built["am-mem"]
    assert isinstance(memory, AltMin)
    assert isinstance(memory.solver, Memory)
    assert registry.rules.get("am-mem").lr == Memory().lr
    assert memory.solver.max_gain == Memory().max_gain
    fc, lenet = built["am-paper-fc"], built["am-paper-lenet"]
    assert isinstance(fc, AltMin)
    assert isinstance(lenet, AltMin)
    assert (fc.credit.mu, fc.credit.normalize, fc.weight_inputs) == (0.003, False, "new")
    assert (lenet.credit.mu, lenet.credit.mu_growth, lenet.credit.mu_limit) == (0.01, 1.1, 1.5)
