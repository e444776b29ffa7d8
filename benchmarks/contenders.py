"""Peer optimizers, and this library's as they are raced against them: a plugin that registers them as rules.

    beyondprop compare --plugin benchmarks/contenders.py --net mlp:100x2 --rule adam --rule muon --rule soap

Settings besides the learning rate are stated here, the same for every problem; where no rate is given, it is the second of
the grid. Second-order methods renew what is costly (eigenbases, inverses, roots) every 10 steps. Names that the package has for
other settings end in `-raced`. A rule whose package is not installed is registered all the same: building it says where to get
it, which a rule that is not there could not.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from beyondprop import AffineProjection, Backprop, LocoProp
from beyondprop.lab import RuleSpec, register
from beyondprop.stages.losses import LossFunction

EVERY = 10  # steps between renewals of what is costly in second-order methods

# Two are on no package index; these are the versions that were measured.
SOURCES = {
    "torch": "pip install torch",
    "beyondprop": "this library",
    "heavyball": "pip install 'beyondprop[benchmarks]'",
    "distributed_shampoo": "pip install --ignore-requires-python git+https://github.com/facebookresearch/optimizers@f6066066",
    "kfac": "pip install git+https://github.com/gpauloski/kfac-pytorch@869cf110",
}

Optimizers = Callable[[nn.Module, float], tuple[Optimizer, ...]]

# Loaded before any comparison collects warnings: what follows is known and harmless.
warnings.filterwarnings("ignore", message="NVIDIA Apex is not installed")
warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the first layer, with its gradient
warnings.filterwarnings("ignore", message="Learning rate changed between steps")  # SOAP follows


def _rule(
    model: nn.Module, loss: LossFunction, lr: float, *, make: Optimizers, before: Callable[[nn.Module], Any] | None
) -> Backprop:
    """Return backpropagation with optimizers that step together, and what rewrites the gradients before them."""
    optimizers = make(model, lr)
    rule = Backprop(model, loss, optimizers[0], preconditioner=None if before is None else before(model))
    rule.optimizers = optimizers
    return rule


def _package(name: str) -> Any:
    """Return a module of a package that may be missing."""
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"{package} is not installed; get it by: {SOURCES[package]}", name=package) from error


PLAIN = (bool, int, float, str, list, torch.Tensor)


class Peer(Optimizer):
    """An optimizer of another package, in a form that comparisons can copy and save.

    Some cannot be copied, and their states hold sets and the like. A copy is built anew; the state is kept as the bytes of a
    file, of which nothing but tensors and plain values is read back.

    Args:
        params: what is trained.
        make: `make(params)` returns the optimizer.
    """

    def __init__(self, params: list[nn.Parameter], make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        super().__init__(params, {})
        self.params, self.make, self.inner = params, make, make(params)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        state, file = self.inner.state_dict(), io.BytesIO()
        plain = [{k: v for k, v in group.items() if isinstance(v, PLAIN)} for group in state["param_groups"]]
        torch.save({**state, "param_groups": plain}, file)
        return {"file": torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = torch.load(io.BytesIO(bytes(state_dict["file"].cpu().numpy())), weights_only=True)
        # What is not plain is as it was built.
        built = self.inner.state_dict()["param_groups"]
        state["param_groups"] = [now | saved for now, saved in zip(built, state["param_groups"], strict=True)]
        self.inner.load_state_dict(state)
        self.param_groups = self.inner.param_groups

    def __deepcopy__(self, memo: dict[int, Any]) -> Peer:
        return Peer(copy.deepcopy(self.params, memo), self.make)


def _peer(make: Callable[[list[nn.Parameter], float], Optimizer]) -> Optimizers:
    return lambda model, lr: (Peer(list(model.parameters()), lambda params: make(params, lr)),)


def _torch(name: str, **settings: Any) -> Optimizers:
    return lambda model, lr: (getattr(torch.optim, name)(model.parameters(), lr=lr, **settings),)


def _muon(model: nn.Module, lr: float) -> tuple[Optimizer, ...]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)
    return muon, torch.optim.Adam(others, lr=lr / 10, betas=(0.9, 0.95))


class Flattened(torch.optim.Muon):
    """Muon for convolutions, too: their weights as matrices `(out, in * kernel)`, as its authors do."""

    def __init__(self, params: list[nn.Parameter], **settings: Any) -> None:
        self.sources = params
        super().__init__([nn.Parameter(p.detach().flatten(1)) for p in params], **settings)

    def step(self, closure: Any = None) -> Any:
        for source, flat in zip(self.sources, self.param_groups[0]["params"], strict=True):
            flat.grad = None if source.grad is None else source.grad.flatten(1)
        return super().step(closure)


def _muon_inside(model: nn.Module, lr: float) -> tuple[Optimizer, ...]:
    """Build Muon for all weights but the first and last layer's, which with the rest get AdamW, as its authors advise."""
    carriers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
    inside: list[Any] = [m.weight for m in carriers[1:-1]]
    taken = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in taken]
    muon = Flattened(inside, lr=lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=lr, weight_decay=1e-2)


def _shampoo(params: list[nn.Parameter], lr: float) -> Optimizer:
    package = _package("distributed_shampoo")
    return package.DistributedShampoo(
        params,
        lr=lr,
        betas=(0.9, 0.95),
        epsilon=1e-12,
        max_preconditioner_dim=1024,
        precondition_frequency=EVERY,
        start_preconditioning_step=EVERY,
        grafting_config=package.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-4),
    )


class KFAC:
    """K-FAC with a state of everything: its own leaves out the inverses, and a run that goes on would go on with others."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = _package("kfac.preconditioner").KFACPreconditioner(
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

    def step(self) -> None:
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        inverses = {name: [layer.a_inv, layer.g_inv] for name, layer in self.inner._layers.values()}
        return {"kfac": self.inner.state_dict(), "inverses": inverses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["kfac"], compute_inverses=False)
        for name, layer in self.inner._layers.values():
            layer.a_inv, layer.g_inv = state["inverses"][name]


def _soap(params: list[nn.Parameter], lr: float) -> Optimizer:
    heavyball = _package("heavyball")
    heavyball.utils.compile_mode = None  # compiling takes longer than it saves here
    soap = heavyball.SOAP(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, precondition_frequency=EVERY)
    soap.register_state_dict_post_hook(_without_pickle)
    return soap


def _without_pickle(soap: Optimizer, state: dict[str, Any]) -> None:
    """Leave the frequency out of SOAP's state: it is pickled there, and the optimizer is built with it."""
    del soap
    state["heavyball"].pop("precond_schedule", None)


def _locoprop(**settings: Any) -> Optimizers:
    return lambda model, lr: (LocoProp(model, lr=lr, **settings),)


def _add(
    name: str,
    title: str,
    package: str,
    make: Optimizers,
    grid: tuple[float, float, float, float],
    notes: str = "",
    before: Callable[[nn.Module], Any] | None = None,
) -> None:
    source = SOURCES[package]
    register(RuleSpec(name, title, notes, source, partial(_rule, make=make, before=before), lr=grid[1], grid=grid))


MOMENTUM = _torch("SGD", momentum=0.9)
NESTEROV = _torch("SGD", momentum=0.9, nesterov=True)
RMSPROP = _torch("RMSprop", alpha=0.9, momentum=0.9, eps=1e-5)
ADAM = _torch("Adam", betas=(0.9, 0.95), eps=1e-4)
ADAMW = _torch("AdamW", betas=(0.9, 0.95), eps=1e-4, weight_decay=1e-2)
STRONG = "betas 0.9 and 0.95, eps 1e-4: the best of six settings on the autoencoder"
# `base` is for what has no local problem: normalisation, attention's products, embeddings.
SMALL = {
    "local_steps": 5,
    "target_lr": 100.0,
    "rows": 0.25,
    "momentum": 0.9,
    "base": partial(torch.optim.AdamW, lr=3e-3),
}
SMALL_S = SMALL | {"loss": "squared", "target_lr": 1000.0, "rows": 8}
ROWS_OF_M = {"local_steps": 9, "rows": 32, "target_lr": 30.0, "momentum": 0.998}
EIGHT = partial(AffineProjection, rows=8)

# fmt: off
_add("sgd-raced", "SGD", "torch", _torch("SGD"), (1e-3, 3e-3, 1e-2, 3e-2), "no momentum")
_add("momentum", "Momentum", "torch", MOMENTUM, (3e-4, 1e-3, 3e-3, 1e-2), "0.9")
_add("nesterov", "Nesterov", "torch", NESTEROV, (3e-4, 1e-3, 3e-3, 1e-2), "0.9")
_add("adagrad", "AdaGrad", "torch", _torch("Adagrad"), (3e-3, 1e-2, 2e-2, 3e-2))
_add("rmsprop", "RMSProp", "torch", RMSPROP, (3e-5, 1e-4, 2e-4, 3e-4), "alpha 0.9, momentum 0.9, eps 1e-5")
_add("adam-raced", "Adam", "torch", ADAM, (1e-4, 3e-4, 1e-3, 3e-3), STRONG)
_add("adamw", "AdamW", "torch", ADAMW, (1e-4, 3e-4, 1e-3, 3e-3), f"{STRONG}; weight decay 0.01")
_add("muon", "Muon", "torch", _muon, (1e-2, 3e-2, 6e-2, 1e-1), "Adam at a tenth of the rate for biases")
_add("shampoo", "Shampoo", "distributed_shampoo", _peer(_shampoo), (1e-3, 2e-3, 4e-3, 8e-3),
     "grafted to Adam with betas 0.9 and 0.95, eps 1e-4; roots every 10 steps")
_add("soap", "SOAP", "heavyball", _peer(_soap), (4e-3, 8e-3, 1.6e-2, 3.2e-2), "eigenbases every 10 steps")
_add("kfac", "K-FAC", "kfac", MOMENTUM, (3e-2, 6e-2, 1e-1, 2e-1),
     "momentum 0.9, damping 0.001, KL clip 0.001; factors every step, inverses (better than eigenbases) every 10", KFAC)
_add("locoprop-m-raced", "LocoProp-M", "beyondprop", _locoprop(local_steps=5), (1e-5, 2e-5, 5e-5, 1e-4), "T = 5, all rows")
_add("locoprop-m-rows-raced", "LocoProp-M, 32 rows", "beyondprop", _locoprop(**ROWS_OF_M), (1e-5, 2e-5, 5e-5, 1e-4),
     "T = 9, each local step after the first on 32 rows of the batch; target_lr 30, momentum 0.998")
_add("locoprop-s-raced", "LocoProp-S", "beyondprop", _locoprop(local_steps=10, loss="squared"), (1e-5, 3e-5, 6e-5, 1e-4),
     "T = 10")
_add("projection-momentum", "Projection + momentum", "beyondprop", MOMENTUM, (1e-2, 3e-2, 1e-1, 2e-1),
     "damping 1", AffineProjection)
# A third of 0.01: with ReLU the autoencoder diverges at the others.
_add("projection-nesterov", "Projection + Nesterov", "beyondprop", NESTEROV, (1e-2 / 3, 1e-2, 3e-2, 1e-1),
     "damping 1", AffineProjection)
_add("projection-rmsprop", "Projection + RMSProp", "beyondprop", RMSPROP, (3e-5, 1e-4, 2e-4, 3e-4),
     "damping 1", AffineProjection)
_add("projection-adam", "Projection + Adam", "beyondprop", ADAM, (1e-4, 3e-4, 1e-3, 3e-3),
     "damping 1", AffineProjection)

# For nets with normalisation, attention and convolutions.
_add("adamw-default", "AdamW", "torch", _torch("AdamW"), (3e-4, 1e-3, 3e-3, 1e-2), "torch's defaults: weight decay 0.01")
_add("nesterov-decayed", "Nesterov, decayed", "torch", _torch("SGD", momentum=0.9, nesterov=True, weight_decay=5e-4),
     (2e-2, 5e-2, 1e-1, 2e-1), "0.9; weight decay 0.0005")
_add("muon-inside", "Muon", "torch", _muon_inside, (1e-3, 3e-3, 1e-2, 3e-2), "first and last layer, norms, biases: AdamW")
_add("locoprop-m-small", "LocoProp-M", "beyondprop", _locoprop(**SMALL), (3e-5, 1e-4, 3e-4, 1e-3),
     "T = 5 on a quarter of the batch, target_lr 100, momentum 0.9; AdamW 0.003 for the rest")
_add("locoprop-s-small", "LocoProp-S", "beyondprop", _locoprop(**SMALL_S), (1e-4, 3e-4, 1e-3, 3e-3),
     "T = 5, X^T X of 8 samples, target_lr 1000, momentum 0.9; AdamW 0.003 for the rest")
_add("projection-small", "Projection + AdamW", "beyondprop", _torch("AdamW"), (3e-4, 1e-3, 3e-3, 1e-2),
     "damping 1, X^T X of 8 samples", EIGHT)
# fmt: on
