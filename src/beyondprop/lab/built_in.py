"""The rules that `beyondprop compare --rule NAME` knows by itself, one row each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from beyondprop.credit.feedback import DirectFeedbackAlignment, FeedbackAlignment
from beyondprop.lab.registry import Build, RuleSpec, register
from beyondprop.optim import AffineProjection, LocoProp, adam, sgd_with_decay
from beyondprop.rules import AltMin, Backprop, DifferenceTargetProp, LearningRule, LocalRule
from beyondprop.rules.offline import ADMM, BCD, MAC, OfflineAltMin
from beyondprop.solvers import Descent, Memory
from beyondprop.stages.losses import LossFunction


def nesterov(lr: float) -> Callable[..., torch.optim.Optimizer]:
    """Return a factory of SGD with Nesterov momentum 0.9."""
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)


def _projected(model: nn.Module, loss: LossFunction, lr: float) -> LearningRule:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    return Backprop(model, loss, optimizer, preconditioner=AffineProjection(model))


def _locoprop(kind: str, steps: int, rows: float | None = None) -> Build:
    return lambda model, loss, lr: Backprop(
        model, loss, LocoProp(model, lr=lr, loss=kind, local_steps=steps, rows=rows)
    )


def _published(preset: Callable[..., LearningRule]) -> Build:
    return lambda model, loss, lr: preset(model, loss, weight_solver=partial(torch.optim.Adam, lr=lr))


_AM = "Choromanska et al., ICML 2019, arXiv 1806.09077"
_LOCOPROP = "Amid, Anil & Warmuth, AISTATS 2022, arXiv 2106.06199"
_ADAM_GRID, _SGD_GRID, _LOCOPROP_GRID = (3e-4, 1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1, 3e-1), (1e-5, 3e-5, 1e-4, 3e-4)

_LEAST_BATCH = {
    **dict.fromkeys(("sgd", "sgd-decay", "am-sgd", "am-mem-bcd"), 50),
    **dict.fromkeys(("locoprop-m", "locoprop-m-rows", "locoprop-s"), 200),
}
"""Below, rates shrink in proportion: the steps of these rules have no bound of their own, and small batches are noisy."""

# fmt: off
# name, title, summary, source, build, lr, grid, schedule, whole set, home, page
for _row in (
    ("am-adam", "AM-Adam", "alternating minimization, line-search codes, Adam weight steps", f"{_AM}, Algorithm 2.1",
     lambda model, loss, lr: AltMin(model, loss, adam(lr)), 3e-3, _ADAM_GRID, None, False, "AltMin", "altmin"),
    ("am-adam-unit", "AM-Adam, unit damping", "as am-adam, with the published damping of 1 below blocks of layers, too",
     f"{_AM}, Algorithm 2.1", lambda model, loss, lr: AltMin(model, loss, adam(lr), damping=1.0), 3e-3, _ADAM_GRID, None, False,
     "AltMin", "altmin"),
    ("am-sgd", "AM-SGD", "alternating minimization, line-search codes, Nesterov SGD weight steps", f"{_AM}, Algorithm 2.1",
     lambda model, loss, lr: AltMin(model, loss, nesterov(lr)), 0.03, _SGD_GRID, None, False, "AltMin", "altmin"),
    ("am-mem", "AM-mem (RLS)", "alternating minimization with memory, damped recursive least squares",
     f"{_AM}, Algorithm 2.3, in delta form", lambda model, loss, lr: AltMin(model, loss, Memory(lr=lr)),
     2.0, (0.3, 1.0, 2.0, 4.0), None, False, "Memory", "altmin"),
    ("am-mem-bcd", "AM-mem (BCD)", "alternating minimization with memory, block coordinate descent as published",
     f"{_AM}, Algorithm 2.3", lambda model, loss, lr: AltMin(
         model, loss, Memory("bcd", forgetting=0.1, damping=1e-2, block=32, output_lr=lr)
     ), 0.01, (3e-3, 1e-2, 3e-2, 1e-1), None, False, "Memory", "altmin"),
    ("am-paper-fc", "AM-Adam (published, FC)",
     "published settings for fully-connected nets: 5 Nesterov code steps, Adam 0.008 halved every 8 epochs",
     f"{_AM}, authors' release", _published(AltMin.paper_fc),
     8e-3, (1e-3, 3e-3, 8e-3, 2e-2), "halve:8", False, "AltMin", "altmin"),
    ("am-paper-lenet", "AM-Adam (published, LeNet)",
     "published settings for LeNet-5: 1 code step, mu growing by 1.1 an epoch, Adam 0.002", f"{_AM}, authors' experiment code",
     _published(AltMin.paper_lenet), 2e-3, (5e-4, 1e-3, 2e-3, 5e-3), "constant", False, "AltMin", "altmin"),
    ("am-paper-binary", "AM-Adam (published, binary)",
     "published settings for binary nets: 10 Nesterov code steps, Adam 0.008 halved every 8 epochs", f"{_AM}, authors' release",
     _published(AltMin.paper_binary), 8e-3, (1e-3, 3e-3, 8e-3, 2e-2), "halve:8", False, "AltMin", "altmin"),
    ("locoprop-m", "LocoProp-M", "5 local steps on the matching loss of each layer", _LOCOPROP, _locoprop("matching", 5),
     3e-5, _LOCOPROP_GRID, None, False, "LocoProp", "locoprop"),
    ("locoprop-m-rows", "LocoProp-M (rows)",
     "9 local steps on the matching loss, each after the first on an eighth of the batch", _LOCOPROP,
     _locoprop("matching", 9, 0.125), 3e-5, _LOCOPROP_GRID, None, False, "LocoProp", "locoprop"),
    ("locoprop-s", "LocoProp-S", "10 local steps on the squared loss of each layer", _LOCOPROP, _locoprop("squared", 10),
     3e-5, _LOCOPROP_GRID, None, False, "LocoProp", "locoprop"),
    ("consequentialism", "Consequentialism", "gradients projected over the batch, SGD with momentum 0.9",
     "Paeedeh & Ghiasi-Shirazi, Neurocomputing 2021, arXiv 2003.05164", _projected, 0.1, (0.01, 0.03, 0.1, 0.3), None, False,
     "AffineProjection", "locoprop"),
    ("adam", "Backprop, Adam", "backpropagation with Adam", "Kingma & Ba, ICLR 2015, arXiv 1412.6980",
     lambda model, loss, lr: Backprop(model, loss, adam(lr)), 3e-3, _ADAM_GRID, None, False, "Backprop", "comparing"),
    ("sgd-decay", "Backprop, SGD with decay",
     "backpropagation with momentum 0.9 and weight decay 2e-4 on the weights of Linear, convolutions and attention alone",
     "Gomez et al., NeurIPS 2017, arXiv 1707.04585, authors' code",
     lambda model, loss, lr: Backprop(model, loss, sgd_with_decay(model, lr, 2e-4)), 0.1, _SGD_GRID, None, False, "Backprop",
     "comparing"),
    ("sgd", "Backprop, SGD", "backpropagation with Nesterov momentum 0.9", "Sutskever et al., ICML 2013",
     lambda model, loss, lr: Backprop(model, loss, nesterov(lr)), 0.03, _SGD_GRID, None, False, "Backprop", "comparing"),
    # Rules that keep codes for the whole set have no learning rate; 1 / lr is the weight of their penalties.
    ("offline-am", "Offline AM",
     "alternating minimization over the codes of the whole set, line-search codes, least-squares weights",
     f"{_AM}, the offline baseline", lambda model, loss, lr: OfflineAltMin(model, loss, mu=1 / lr),
     1.0, (0.3, 1.0, 10.0, 100.0), "constant", True, "OfflineAltMin", "offline"),
    ("mac", "MAC", "method of auxiliary coordinates: codes after the nonlinearity, penalties growing by 1.1 a sweep",
     "Carreira-Perpinan & Wang, AISTATS 2014, arXiv 1212.5921", lambda model, loss, lr: MAC(model, loss, mu=1 / lr),
     100.0, (1.0, 10.0, 100.0, 1000.0), "constant", True, "MAC", "offline"),
    ("bcd", "BCD (three-splitting)", "block coordinate descent in closed forms, squared error on one-hot labels",
     "Zeng et al., ICML 2019, arXiv 1803.00225, Algorithm 2",
     lambda model, loss, lr: BCD(model, loss, output_loss="squared", gamma=1 / lr, rho=1 / lr),
     1.0, (0.3, 1.0, 3.0, 10.0), "constant", True, "BCD", "offline"),
    ("admm", "ADMM",
     "no gradients: least squares, closed-form codes, a multiplier on the output, hinge loss on one-hot labels",
     "Taylor et al., ICML 2016, arXiv 1605.02026, Algorithm 1",
     lambda model, loss, lr: ADMM(
         model, loss, output_loss="hinge" if isinstance(loss, nn.CrossEntropyLoss) else "squared", beta=1 / lr, gamma=10 / lr
     ), 1.0, (0.3, 1.0, 3.0, 10.0), "constant", True, "ADMM", "offline"),
    ("fa", "Feedback alignment", "errors through fixed random tensors in place of the weights, Adam weight steps",
     "Lillicrap et al., Nature Communications 2016",
     lambda model, loss, lr: LocalRule(model, loss, FeedbackAlignment(), Descent(adam(lr))),
     3e-3, _ADAM_GRID, None, False, "FeedbackAlignment", "feedback"),
    ("dfa", "Direct feedback alignment", "the output error through one fixed random matrix a stage, Adam weight steps",
     "Nøkland, NIPS 2016, arXiv 1609.01596",
     lambda model, loss, lr: LocalRule(model, loss, DirectFeedbackAlignment(), Descent(adam(lr))),
     3e-3, _ADAM_GRID, None, False, "DirectFeedbackAlignment", "feedback"),
    ("dtp", "Difference target propagation", "targets through learned inverses, Adam weight steps",
     "Lee et al., ECML 2015, arXiv 1412.7525", lambda model, loss, lr: DifferenceTargetProp(model, loss, adam(lr)),
     3e-3, _ADAM_GRID, None, False, "DifferenceTargetProp", "targetprop"),
):
    register(RuleSpec(*_row, least_batch=_LEAST_BATCH.get(_row[0], 1)))
# fmt: on
