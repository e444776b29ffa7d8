"""The optimizers of the benchmarks by name: how each is built, from which package, and the learning rates it may choose from.

All of them see the same model, batches and learning rate schedule. Settings besides the learning rate are stated here,
the same for every problem. Second-order methods renew what is costly (eigenbases, inverses, roots) every 10 steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer


class Preconditioner(Protocol):
    """What rewrites gradients between `backward` and the optimizer's step."""

    def step(self) -> object:
        """Rewrite the gradients in place."""


EVERY = 10  # steps between renewals of what is costly in second-order methods

Built = tuple[Optimizer, Preconditioner | None]


@dataclass(frozen=True)
class Contender:
    """An optimizer with everything but the learning rate fixed.

    Attributes:
        title: What tables and figures call it.
        package: The module that it needs; `SOURCES` has where to get it.
        build: `build(model, lr)` returns an optimizer, and a preconditioner where there is one.
        grid: The four learning rates to choose from.
        kind: `first`, `second`, `locoprop` or `projection`: its look in figures.
        notes: Settings worth stating, and the source of those that are not the package's own.
    """

    title: str
    package: str
    build: Callable[[nn.Module, float], Built]
    grid: tuple[float, float, float, float]
    kind: str
    notes: str = ""


class Together(Optimizer):
    """Several optimizers that step together; a scheduler sees the groups of all of them."""

    def __init__(self, *optimizers: Optimizer) -> None:
        super().__init__([{**group} for o in optimizers for group in o.param_groups], {})
        self.param_groups = [group for o in optimizers for group in o.param_groups]
        self.optimizers = optimizers

    def step(self, closure: Any = None) -> Any:
        for optimizer in self.optimizers:
            optimizer.step(closure)


def _torch(name: str, **settings: Any) -> Callable[[nn.Module, float], Built]:
    """Return how an optimizer of torch is built."""
    return lambda model, lr: (getattr(torch.optim, name)(model.parameters(), lr=lr, **settings), None)


def _muon(model: nn.Module, lr: float) -> Built:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)
    return Together(muon, torch.optim.Adam(others, lr=lr / 10, betas=(0.9, 0.95))), None


class Flattened(torch.optim.Muon):
    """Muon for convolutions, too: their weights as matrices `(out, in * kernel)`, as its authors do."""

    def __init__(self, params: list[nn.Parameter], **settings: Any) -> None:
        self.sources = params
        super().__init__([nn.Parameter(p.detach().flatten(1)) for p in params], **settings)

    def step(self, closure: Any = None) -> Any:
        for source, flat in zip(self.sources, self.param_groups[0]["params"], strict=True):
            flat.grad = None if source.grad is None else source.grad.flatten(1)
        return super().step(closure)


def _muon_inside(model: nn.Module, lr: float) -> Built:
    """Build Muon for all weights but the first and last layer's, which with the rest get AdamW, as its authors advise."""
    carriers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
    inside: list[Any] = [m.weight for m in carriers[1:-1]]
    taken = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in taken]
    muon = Flattened(inside, lr=lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    return Together(muon, torch.optim.AdamW(others, lr=lr, weight_decay=1e-2)), None


def _shampoo(model: nn.Module, lr: float) -> Built:
    package = import_module("distributed_shampoo")
    return package.DistributedShampoo(
        model.parameters(),
        lr=lr,
        betas=(0.9, 0.95),
        epsilon=1e-12,
        max_preconditioner_dim=1024,
        precondition_frequency=EVERY,
        start_preconditioning_step=EVERY,
        grafting_config=package.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-4),
    ), None


def _kfac(model: nn.Module, lr: float) -> Built:
    warnings.filterwarnings("ignore", message="NVIDIA Apex is not installed")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the first layer, with its gradient
    preconditioner = import_module("kfac.preconditioner").KFACPreconditioner(
        model,
        factor_update_steps=1,
        inv_update_steps=EVERY,
        compute_method="inverse",
        damping=1e-3,
        factor_decay=0.95,
        # The bound on a step's change in the KL divergence is taken at the package's default rate of 0.1, so that it
        # scales with the rate and its schedule, which are the optimizer's.
        kl_clip=1e-3,
        lr=0.1,
    )
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), preconditioner


def _soap(model: nn.Module, lr: float) -> Built:
    heavyball = import_module("heavyball")
    warnings.filterwarnings("ignore", message="Learning rate changed between steps")  # it follows
    heavyball.utils.compile_mode = None  # compiling takes longer than it saves here
    soap = heavyball.SOAP(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, precondition_frequency=EVERY)
    return soap, None


def _locoprop(**settings: Any) -> Callable[[nn.Module, float], Built]:
    """Return how this library's LocoProp is built."""

    def build(model: nn.Module, lr: float) -> Built:
        return import_module("beyondprop").LocoProp(model, lr=lr, **settings), None

    return build


def _projected(build: Callable[[nn.Module, float], Built], **settings: Any) -> Callable[[nn.Module, float], Built]:
    """Return how affine projection in front of another optimizer is built."""

    def both(model: nn.Module, lr: float) -> Built:
        return build(model, lr)[0], import_module("beyondprop").AffineProjection(model, **settings)

    return both


# Two are on no package index; these are the versions that were measured.
SOURCES = {
    "torch": "pip install torch",
    "beyondprop": "this library, in a version with LocoProp and AffineProjection",
    "heavyball": "pip install 'beyondprop[benchmarks]'",
    "distributed_shampoo": "pip install --ignore-requires-python git+https://github.com/facebookresearch/optimizers@f6066066",
    "kfac": "pip install git+https://github.com/gpauloski/kfac-pytorch@869cf110",
}

MOMENTUM = _torch("SGD", momentum=0.9)
NESTEROV = _torch("SGD", momentum=0.9, nesterov=True)
RMSPROP = _torch("RMSprop", alpha=0.9, momentum=0.9, eps=1e-5)
ADAM = _torch("Adam", betas=(0.9, 0.95), eps=1e-4)
ADAMW = _torch("AdamW", betas=(0.9, 0.95), eps=1e-4, weight_decay=1e-2)
STRONG = "betas 0.9 and 0.95, eps 1e-4: the best of six settings on the autoencoder"

CONTENDERS: dict[str, Contender] = {
    "sgd": Contender("SGD", "torch", _torch("SGD"), (1e-3, 3e-3, 1e-2, 3e-2), "first"),
    "momentum": Contender("Momentum", "torch", MOMENTUM, (3e-4, 1e-3, 3e-3, 1e-2), "first", "0.9"),
    "nesterov": Contender("Nesterov", "torch", NESTEROV, (3e-4, 1e-3, 3e-3, 1e-2), "first", "0.9"),
    "adagrad": Contender("AdaGrad", "torch", _torch("Adagrad"), (3e-3, 1e-2, 2e-2, 3e-2), "first"),
    "rmsprop": Contender(
        "RMSProp", "torch", RMSPROP, (3e-5, 1e-4, 2e-4, 3e-4), "first", "alpha 0.9, momentum 0.9, eps 1e-5"
    ),
    "adam": Contender("Adam", "torch", ADAM, (1e-4, 3e-4, 1e-3, 3e-3), "first", STRONG),
    "adamw": Contender("AdamW", "torch", ADAMW, (1e-4, 3e-4, 1e-3, 3e-3), "first", f"{STRONG}; weight decay 0.01"),
    "muon": Contender(
        "Muon", "torch", _muon, (1e-2, 3e-2, 6e-2, 1e-1), "second", "Adam at a tenth of the rate for biases"
    ),
    "shampoo": Contender(
        "Shampoo",
        "distributed_shampoo",
        _shampoo,
        (1e-3, 2e-3, 4e-3, 8e-3),
        "second",
        "grafted to the Adam of this table; roots every 10 steps",
    ),
    "soap": Contender("SOAP", "heavyball", _soap, (4e-3, 8e-3, 1.6e-2, 3.2e-2), "second", "eigenbases every 10 steps"),
    "kfac": Contender(
        "K-FAC",
        "kfac",
        _kfac,
        (3e-2, 6e-2, 1e-1, 2e-1),
        "second",
        "momentum 0.9, damping 0.001, KL clip 0.001; factors every step, inverses (better than eigenbases) every 10",
    ),
    "locoprop-m": Contender(
        "LocoProp-M", "beyondprop", _locoprop(local_steps=5), (1e-5, 2e-5, 5e-5, 1e-4), "locoprop", "T = 5, all rows"
    ),
    "locoprop-m-rows": Contender(
        "LocoProp-M, 32 rows",
        "beyondprop",
        _locoprop(local_steps=9, rows=32, target_lr=30.0, momentum=0.998),
        (1e-5, 2e-5, 5e-5, 1e-4),
        "locoprop",
        "T = 9, each local step after the first on 32 of the 1000 rows; target_lr 30, momentum 0.998",
    ),
    "locoprop-s": Contender(
        "LocoProp-S",
        "beyondprop",
        _locoprop(local_steps=10, loss="squared"),
        (1e-5, 3e-5, 6e-5, 1e-4),
        "locoprop",
        "T = 10",
    ),
    "projection-momentum": Contender(
        "Projection + momentum", "beyondprop", _projected(MOMENTUM), (1e-2, 3e-2, 1e-1, 2e-1), "projection", "damping 1"
    ),
    "projection-nesterov": Contender(
        "Projection + Nesterov", "beyondprop", _projected(NESTEROV), (1e-2, 3e-2, 1e-1, 2e-1), "projection", "damping 1"
    ),
    "projection-rmsprop": Contender(
        "Projection + RMSProp", "beyondprop", _projected(RMSPROP), (3e-5, 1e-4, 2e-4, 3e-4), "projection", "damping 1"
    ),
    "projection-adam": Contender(
        "Projection + Adam", "beyondprop", _projected(ADAM), (1e-4, 3e-4, 1e-3, 3e-3), "projection", "damping 1"
    ),
}

# For nets with normalisation, attention and convolutions; AdamW takes what is captured by no method.
BASE = partial(torch.optim.AdamW, lr=3e-3)
SMALL = {"target_lr": 100.0, "rows": 0.25, "momentum": 0.9, "base": BASE}
MODERN: dict[str, Contender] = {
    "adamw-default": Contender(
        "AdamW", "torch", _torch("AdamW"), (3e-4, 1e-3, 3e-3, 1e-2), "first", "torch's defaults: weight decay 0.01"
    ),
    "nesterov-decayed": Contender(
        "Nesterov, decayed",
        "torch",
        _torch("SGD", momentum=0.9, nesterov=True, weight_decay=5e-4),
        (2e-2, 5e-2, 1e-1, 2e-1),
        "first",
        "0.9; weight decay 0.0005",
    ),
    "muon-inside": Contender(
        "Muon", "torch", _muon_inside, (1e-3, 3e-3, 1e-2, 3e-2), "second", "first and last layer, norms, biases: AdamW"
    ),
    "locoprop-m-small": Contender(
        "LocoProp-M",
        "beyondprop",
        _locoprop(local_steps=5, **SMALL),
        (3e-5, 1e-4, 3e-4, 1e-3),
        "locoprop",
        "T = 5 on a quarter of the batch, target_lr 100, momentum 0.9; AdamW 0.003 for the rest",
    ),
    "locoprop-s-small": Contender(
        "LocoProp-S",
        "beyondprop",
        _locoprop(local_steps=5, loss="squared", **SMALL | {"target_lr": 1000.0, "rows": 8}),
        (1e-4, 3e-4, 1e-3, 3e-3),
        "locoprop",
        "T = 5, X^T X of 8 samples, target_lr 1000, momentum 0.9; AdamW 0.003 for the rest",
    ),
    "projection-small": Contender(
        "Projection + AdamW",
        "beyondprop",
        _projected(_torch("AdamW"), rows=8),
        (3e-4, 1e-3, 3e-3, 1e-2),
        "projection",
        "damping 1, X^T X of 8 samples",
    ),
}
CONTENDERS |= MODERN


def missing(name: str) -> str:
    """Return what a contender lacks and how to get it, or nothing."""
    package = CONTENDERS[name].package
    found = find_spec(package) is not None
    if found and package == "beyondprop":
        found = {"LocoProp", "AffineProjection"} <= set(import_module(package).__all__)
    return "" if found else f"{package} is not installed ({SOURCES[package]})"
