"""The one table of learning rules by name: what `beyondprop compare --rule NAME` builds, and where others add theirs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from beyondprop import _checks
from beyondprop.credit.feedback import DirectFeedbackAlignment, FeedbackAlignment
from beyondprop.optim.affine_projection import AffineProjection
from beyondprop.optim.factories import adam
from beyondprop.optim.locoprop import LocoProp
from beyondprop.rules.altmin import AltMin
from beyondprop.rules.backprop import Backprop
from beyondprop.rules.base import LearningRule
from beyondprop.rules.local import LocalRule
from beyondprop.rules.offline.admm import ADMM
from beyondprop.rules.offline.altmin import OfflineAltMin
from beyondprop.rules.offline.bcd import BCD
from beyondprop.rules.offline.mac import MAC
from beyondprop.rules.targetprop import DifferenceTargetProp
from beyondprop.solvers.descent import Descent
from beyondprop.solvers.memory import Memory
from beyondprop.stages.losses import LossFunction

Build = Callable[[nn.Module, LossFunction, float], LearningRule]


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A learning rule as the command line knows it.

    Attributes:
        name: what follows `--rule`.
        title: name in tables and figures.
        summary: one line for `beyondprop list`.
        source: paper, with what part of it.
        build: `build(model, loss, lr)` returns the rule.
        lr: learning rate where none is given; for a rule without one, 1 over the weight of its penalties.
        grid: learning rates that `--tune` tries, the same number for every rule.
        schedule: learning-rate schedule where none is given; None: the run's own.
        whole_set: whether a step takes the whole training set: one step an epoch, its rows in one order.
    """

    name: str
    title: str
    summary: str
    source: str
    build: Build
    lr: float
    grid: tuple[float, ...]
    schedule: str | None = None
    whole_set: bool = False

    def __post_init__(self) -> None:
        if not self.name or any(c.isspace() or c in "/=:," for c in self.name):
            raise ValueError(f"name must be a word without spaces, '/', '=', ':' and ',', got {self.name!r}.")
        _checks.positive("lr", self.lr)


_RULES: dict[str, RuleSpec] = {}


def register(spec: RuleSpec, *, replace: bool = False) -> RuleSpec:
    """Add a rule to the table and return it.

    Raises:
        ValueError: if the name is taken and `replace` is false.
    """
    if spec.name in _RULES and not replace:
        raise ValueError(f"A rule named {spec.name!r} is registered already; choose another name or pass replace=True.")
    _RULES[spec.name] = spec
    return spec


def get(name: str) -> RuleSpec:
    """Return the rule of that name.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    return _RULES[_checks.one_of("rule", name, names())]


def names() -> list[str]:
    """Return the registered names in the order of registration."""
    return list(_RULES)


def load_plugin(where: str) -> None:
    """Import a module, by dotted name or as a `.py` file, that registers rules of its own.

    Raises:
        ImportError: if it cannot be found.
    """
    if not where.endswith(".py"):
        importlib.import_module(where)
        return
    path = Path(where)
    spec = importlib.util.spec_from_file_location(f"beyondprop_plugin_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"No plugin at {where}: a .py file or the dotted name of an installed module is needed.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def _sgd(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)


def _projected(model: nn.Module, loss: LossFunction, lr: float) -> LearningRule:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    return Backprop(model, loss, optimizer, preconditioner=AffineProjection(model))


def _locoprop(kind: str, steps: int, rows: float | None = None) -> Build:
    def build(model: nn.Module, loss: LossFunction, lr: float) -> LearningRule:
        return Backprop(model, loss, LocoProp(model, lr=lr, loss=kind, local_steps=steps, rows=rows))

    return build


_AM = "Choromanska et al., ICML 2019, arXiv 1806.09077"
_ADAM_GRID = (3e-4, 1e-3, 3e-3, 1e-2)
_LOCOPROP = "Amid, Anil & Warmuth, AISTATS 2022, arXiv 2106.06199"
_LOCOPROP_GRID = (1e-5, 3e-5, 1e-4, 3e-4)
_SGD_GRID = (1e-2, 3e-2, 1e-1, 3e-1)

for _spec in (
    RuleSpec(
        "am-adam",
        "AM-Adam",
        "alternating minimization, line-search codes, Adam weight steps",
        f"{_AM}, Algorithm 2.1",
        lambda model, loss, lr: AltMin(model, loss, adam(lr)),
        lr=3e-3,
        grid=_ADAM_GRID,
    ),
    RuleSpec(
        "am-adam-unit",
        "AM-Adam, unit damping",
        "as am-adam, with the published damping of 1 below blocks of layers, too",
        f"{_AM}, Algorithm 2.1",
        lambda model, loss, lr: AltMin(model, loss, adam(lr), damping=1.0),
        lr=3e-3,
        grid=_ADAM_GRID,
    ),
    RuleSpec(
        "am-sgd",
        "AM-SGD",
        "alternating minimization, line-search codes, Nesterov SGD weight steps",
        f"{_AM}, Algorithm 2.1",
        lambda model, loss, lr: AltMin(model, loss, _sgd(lr)),
        lr=0.1,
        grid=_SGD_GRID,
    ),
    RuleSpec(
        "am-mem",
        "AM-mem (RLS)",
        "alternating minimization with memory, damped recursive least squares",
        f"{_AM}, Algorithm 2.3, in delta form",
        lambda model, loss, lr: AltMin(model, loss, Memory(lr=lr)),
        lr=2.0,
        grid=(0.3, 1.0, 2.0, 4.0),
    ),
    RuleSpec(
        "am-mem-bcd",
        "AM-mem (BCD)",
        "alternating minimization with memory, block coordinate descent as published",
        f"{_AM}, Algorithm 2.3",
        lambda model, loss, lr: AltMin(
            model, loss, Memory("bcd", forgetting=0.1, damping=1e-2, block=32, output_lr=lr)
        ),
        lr=0.1,
        grid=_SGD_GRID,
    ),
    RuleSpec(
        "am-paper-fc",
        "AM-Adam (published, FC)",
        "published settings for fully-connected nets: 5 Nesterov code steps, Adam 0.008 halved every 8 epochs",
        f"{_AM}, authors' release",
        lambda model, loss, lr: AltMin.paper_fc(model, loss, weight_solver=partial(torch.optim.Adam, lr=lr)),
        lr=8e-3,
        grid=(1e-3, 3e-3, 8e-3, 2e-2),
        schedule="halve:8",
    ),
    RuleSpec(
        "am-paper-lenet",
        "AM-Adam (published, LeNet)",
        "published settings for LeNet-5: 1 code step, mu growing by 1.1 an epoch, Adam 0.002",
        f"{_AM}, authors' experiment code",
        lambda model, loss, lr: AltMin.paper_lenet(model, loss, weight_solver=partial(torch.optim.Adam, lr=lr)),
        lr=2e-3,
        grid=(5e-4, 1e-3, 2e-3, 5e-3),
        schedule="constant",
    ),
    RuleSpec(
        "am-paper-binary",
        "AM-Adam (published, binary)",
        "published settings for binary nets: 10 Nesterov code steps, Adam 0.008 halved every 8 epochs",
        f"{_AM}, authors' release",
        lambda model, loss, lr: AltMin.paper_binary(model, loss, weight_solver=partial(torch.optim.Adam, lr=lr)),
        lr=8e-3,
        grid=(1e-3, 3e-3, 8e-3, 2e-2),
        schedule="halve:8",
    ),
    RuleSpec(
        "locoprop-m",
        "LocoProp-M",
        "5 local steps on the matching loss of each layer",
        _LOCOPROP,
        _locoprop("matching", 5),
        lr=3e-5,
        grid=_LOCOPROP_GRID,
    ),
    RuleSpec(
        "locoprop-m-rows",
        "LocoProp-M (rows)",
        "9 local steps on the matching loss, each after the first on an eighth of the batch",
        _LOCOPROP,
        _locoprop("matching", 9, 0.125),
        lr=3e-5,
        grid=_LOCOPROP_GRID,
    ),
    RuleSpec(
        "locoprop-s",
        "LocoProp-S",
        "10 local steps on the squared loss of each layer",
        _LOCOPROP,
        _locoprop("squared", 10),
        lr=3e-5,
        grid=_LOCOPROP_GRID,
    ),
    RuleSpec(
        "consequentialism",
        "Consequentialism",
        "gradients projected over the batch, SGD with momentum 0.9",
        "Paeedeh & Ghiasi-Shirazi, Neurocomputing 2021, arXiv 2003.05164",
        _projected,
        lr=0.1,
        grid=(0.01, 0.03, 0.1, 0.3),
    ),
    RuleSpec(
        "adam",
        "Backprop, Adam",
        "backpropagation with Adam",
        "Kingma & Ba, ICLR 2015, arXiv 1412.6980",
        lambda model, loss, lr: Backprop(model, loss, adam(lr)),
        lr=3e-3,
        grid=_ADAM_GRID,
    ),
    RuleSpec(
        "sgd",
        "Backprop, SGD",
        "backpropagation with Nesterov momentum 0.9",
        "Sutskever et al., ICML 2013",
        lambda model, loss, lr: Backprop(model, loss, _sgd(lr)),
        lr=0.1,
        grid=_SGD_GRID,
    ),
    # Rules that keep codes for the whole set have no learning rate; 1 / lr is the weight of their penalties.
    RuleSpec(
        "offline-am",
        "Offline AM",
        "alternating minimization over the codes of the whole set, line-search codes, least-squares weights",
        f"{_AM}, the offline baseline",
        lambda model, loss, lr: OfflineAltMin(model, loss, mu=1 / lr),
        lr=1.0,
        grid=(0.3, 1.0, 10.0, 100.0),
        schedule="constant",
        whole_set=True,
    ),
    RuleSpec(
        "mac",
        "MAC",
        "method of auxiliary coordinates: codes after the nonlinearity, penalties growing by 1.1 a sweep",
        "Carreira-Perpinan & Wang, AISTATS 2014, arXiv 1212.5921",
        lambda model, loss, lr: MAC(model, loss, mu=1 / lr),
        lr=100.0,
        grid=(1.0, 10.0, 100.0, 1000.0),
        schedule="constant",
        whole_set=True,
    ),
    RuleSpec(
        "bcd",
        "BCD (three-splitting)",
        "block coordinate descent in closed forms, squared error on one-hot labels",
        "Zeng et al., ICML 2019, arXiv 1803.00225, Algorithm 2",
        lambda model, loss, lr: BCD(model, loss, output_loss="squared", gamma=1 / lr, rho=1 / lr),
        lr=1.0,
        grid=(0.3, 1.0, 3.0, 10.0),
        schedule="constant",
        whole_set=True,
    ),
    RuleSpec(
        "admm",
        "ADMM",
        "no gradients: least squares, closed-form codes, a multiplier on the output, hinge loss on one-hot labels",
        "Taylor et al., ICML 2016, arXiv 1605.02026, Algorithm 1",
        lambda model, loss, lr: ADMM(model, loss, output_loss="hinge", beta=1 / lr, gamma=10 / lr),
        lr=1.0,
        grid=(0.3, 1.0, 3.0, 10.0),
        schedule="constant",
        whole_set=True,
    ),
    RuleSpec(
        "fa",
        "Feedback alignment",
        "errors through fixed random tensors in place of the weights, Adam weight steps",
        "Lillicrap et al., Nature Communications 2016",
        lambda model, loss, lr: LocalRule(model, loss, FeedbackAlignment(), Descent(adam(lr))),
        lr=3e-3,
        grid=_ADAM_GRID,
    ),
    RuleSpec(
        "dfa",
        "Direct feedback alignment",
        "the output error through one fixed random matrix a stage, Adam weight steps",
        "Nøkland, NIPS 2016, arXiv 1609.01596",
        lambda model, loss, lr: LocalRule(model, loss, DirectFeedbackAlignment(), Descent(adam(lr))),
        lr=3e-3,
        grid=_ADAM_GRID,
    ),
    RuleSpec(
        "dtp",
        "Difference target propagation",
        "targets through learned inverses, Adam weight steps",
        "Lee et al., ECML 2015, arXiv 1412.7525",
        lambda model, loss, lr: DifferenceTargetProp(model, loss, adam(lr)),
        lr=3e-3,
        grid=_ADAM_GRID,
    ),
):
    register(_spec)
