"""Memory of reversible residual networks against depth: activations stored, checkpointed, computed again from the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from beyondprop.lab.comparing.member import seeded
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._drawing import OURS, THEIRS, panels
from beyondprop.lab.recipes._kept import Kept
from beyondprop.lab.recipes._revnet import SOURCE
from beyondprop.lab.training.counted import kept_bytes
from beyondprop.nn import revnet
from beyondprop.rules.backprop import Backprop

WIDTHS = (32, 32, 64, 128)
"""Of RevNet-110, at every depth: RevNet-38's last stage has 112 channels, and would keep 3 % less."""
DEPTHS, QUICK_DEPTHS = (38, 110, 218), (14, 26)
MODES = {"store": "stored", "checkpoint": "checkpoint per unit", "inverse": "reversible"}
_LOOKS = {"store": THEIRS, "checkpoint": ("#E69F00", "-."), "inverse": OURS}
MIB = 2.0**20


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Measure every depth in every mode, on one batch of random images: what they show has no part in it."""
    depths, batch = (QUICK_DEPTHS, 4) if context.quick else (DEPTHS, 20)
    kept = Kept(context.out / "memory.json", {"depths": list(depths), "batch": batch})
    found: dict[str, dict[str, list[float]]] = {"kept": {}, "peak": {}, "gradients": {}}
    for mode, title in MODES.items():
        for depth in depths:
            values = kept.get(f"{depth} {mode}", lambda d=depth, m=mode: _measured(d, m, batch))
            held, peak, _ = sizes = [value / MIB for value in values]
            context.say(f"{depth} layers, {title}: {held:.1f} MiB kept, {peak:.1f} MiB at most")
            for kind, size in zip(found, sizes, strict=True):
                found[kind].setdefault(mode, []).append(size)
    _draw(context, depths, found)
    rows = [
        Row(f"{depth} layers, {title}: kept for the backward pass", (found["kept"][mode][i],), "MiB", digits=1)
        for mode, title in MODES.items()
        for i, depth in enumerate(depths)
    ]
    rows += [
        Row(
            f"{depths[-1]} layers, {title}: at most in a step, with gradients",
            (found["peak"][mode][-1],),
            "MiB",
            digits=1,
        )
        for mode, title in MODES.items()
    ]
    growth = {mode: values[-1] / values[0] for mode, values in found["kept"].items()}
    label = f"kept, {depths[-1]} layers over {depths[0]}"
    theirs = "1.00 (85.6 and 85.7 MB for RevNet-38 and -110, MemCNN)"
    rows += [
        Row(f"reversible: {label}", (growth["inverse"],), published=theirs, at_least=0.98, at_most=1.02, digits=3),
        Row(
            f"stored: {label}", (growth["store"],), published="3.40 (238.6 and 810.7 MB for ResNet-32 and -110, MemCNN)"
        ),
    ]
    return rows, {"batch": batch}


def _measured(depth: int, mode: str, batch: int) -> tuple[int, int, int]:
    """Return the bytes that are kept, at most there, and those of the weights' gradients."""
    units = ((depth - 2) // 12,) * 3
    with seeded(0, "cpu"):
        model = revnet(units, WIDTHS, 10, mode=mode)
        rule = Backprop(model, nn.CrossEntropyLoss(), torch.optim.SGD)
        x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10

    def step() -> None:
        rule.model.zero_grad()
        rule.loss(rule.model(x), y).backward()

    held = kept_bytes(rule, x, y)
    step()  # the first one sets up what stays
    rule.model.zero_grad()
    return held, peak_bytes(step), sum(p.nbytes for p in rule.model.parameters())


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes that stood allocated at once during a step on the CPU, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    standing = highest = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        standing += event.nbytes()
        highest = max(highest, standing)
    return highest


def _draw(context: Context, depths: Sequence[int], found: dict[str, dict[str, list[float]]]) -> None:
    titles = ["kept for the backward pass", "at most during a step, with gradients"]
    labels: dict[str, Any] = {"xlabel": "layers", "ylabel": "MiB"}
    with panels(context, 2, size=(8.4, 4.0), titles=titles, legend=-1, **labels) as axes:
        for panel, values in zip(axes[0], (found["kept"], found["peak"]), strict=True):
            for mode, title in MODES.items():
                color, line = _LOOKS[mode]
                panel.plot(depths, values[mode], color=color, linestyle=line, marker="o", label=title)
            panel.set_ylim(0)
            panel.set_xticks(depths)
        look = {"color": "#666666", "linestyle": ":", "label": "gradients alone"}
        axes[0, 1].plot(depths, found["gradients"]["inverse"], **look)


RECIPE = Recipe(
    title="Memory against depth: RevNets stored, checkpointed, reversible",
    source=f"{SOURCE}, Table 1; van de Leemput et al., JOSS 2019 (MemCNN)",
    about=(
        "RevNets of basic units with RevNet-110's widths, batch 20 of 32x32, float32 on a CPU. Kept: bytes that autograd and "
        "the chains hold between the forward and the backward pass, each memory once, without weights and the batch. At most: "
        "the running sum of what is allocated and freed in a step, with the gradients of the weights, which grow with depth. "
        "Transitions and the stem are run again in both modes that save memory."
    ),
    measure=measure,
    minutes=2,
)
