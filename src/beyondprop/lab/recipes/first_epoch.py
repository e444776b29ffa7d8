"""The first epoch, batch by batch: whether alternating minimization learns faster at first."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._compared import compared, summary
from beyondprop.lab.report._style import drawing, entries
from beyondprop.lab.runs.recorded import Run, number

BATCHES = (5, 10, 20, 50, 100)
PUBLISHED = {  # LeNet-5, batch 128: accuracy in % after so many batches
    "adam": {5: "33.6", 10: "55.1", 20: "74.9", 50: "88.5", 100: "93.6"},
    "am-adam": {5: "24.1", 10: "44.8", 20: "61.3", 50: "82.6", 100: "90.6"},
}
RULES = ("am-adam", "am-paper-lenet", "adam")
LINES = {"adam": (0, (3, 1.2)), "am-paper-lenet": "-."}
"""Lines that stay apart where curves lie on each other; all others are whole."""


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Train for the share of an epoch that 100 batches are, LeNet-5 and a fully connected net."""
    quick, rows, settings, runs = context.quick, [], {}, []
    for net, rules in (("lenet5", RULES), ("mlp:100x2", (RULES[0], "am-mem", RULES[2]))):
        run = compared(
            context,
            net.replace(":", "-"),
            Settings(
                data="mnist",
                nets=(net,),
                rules=rules,
                epochs=(20 if quick else 100) / 469,
                tune_epochs=100 / 391,  # held-out rows make the epoch shorter
                batch_size=128,
                seeds=(0,) if quick else tuple(range(5)),
                evaluate_every=5,
                schedule="constant",
                alignment=False,
                tune=not quick,
            ),
        )
        titles = {rule.name: rule.title for rule in run.contenders}
        for name in rules:
            known = PUBLISHED.get(name, {}) if net == "lenet5" else {}
            rows += [
                Row(
                    f"{net}, {titles[name]}, after {count} batches",
                    after(run, name, count),
                    "%",
                    known.get(count, ""),
                    digits=1,
                )
                for count in BATCHES[: 3 if quick else None]
            ]
        settings[net] = summary(run)
        runs.append(run)
    _draw(context, runs)
    return rows, settings


def after(run: Run, rule: str, batches: int) -> tuple[float, ...]:
    """Return the test accuracy of every seed after so many batches, in percent."""
    found = []
    for seed in run.config["seeds"]:
        values = [number(row, "accuracy") for row in run.of("eval", rule, seed) if row["step"] == batches]
        found.append(100 * values[0] if values else float("nan"))
    return tuple(found)


def _draw(context: Context, runs: Sequence[Run]) -> None:
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(9, 4.2), layout="constrained")
        panels = figure.subplots(1, len(runs), sharey=True)
        handles: dict[str, Any] = {}
        for axes, run in zip(panels, runs, strict=True):
            for entry in entries([run]):
                steps, curves = _curves(run, entry.contender.name)
                line = LINES.get(entry.contender.name, "-")
                (handle,) = axes.plot(steps, [fmean(at) for at in curves], color=entry.color, linestyle=line)
                low, high = [min(at) for at in curves], [max(at) for at in curves]
                axes.fill_between(steps, low, high, color=entry.color, alpha=0.15, linewidth=0)
                handles.setdefault(entry.contender.title, handle)
            axes.set_title(run.config["nets"][0])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel(f"batches of {run.config['batch_size']} rows")
        panels[0].set_ylabel("test accuracy (%), mean and range of seeds")
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles), handlelength=3.0
        )
        figure.savefig(context.out / "figure.png", dpi=150)


def _curves(run: Run, rule: str) -> tuple[list[int], list[list[float]]]:
    """Return the evaluated steps, and the accuracies of all seeds at each, in percent."""
    found: dict[int, list[float]] = {}
    for seed in run.config["seeds"]:
        for row in run.of("eval", rule, seed):
            found.setdefault(int(row["step"]), []).append(100 * number(row, "accuracy"))
    return sorted(found), [found[step] for step in sorted(found)]


RECIPE = Recipe(
    title="The first hundred batches on MNIST",
    source='Choromanska et al., ICML 2019, arXiv 1806.09077: "learns faster initially"; numbers from the authors\' logs',
    about=(
        "Batch 128, constant learning rates, chosen by validation accuracy after the same 100 batches, five seeds. Published: "
        "accuracy of the mini-batch itself; here: of the 10,000 test images."
    ),
    measure=measure,
    minutes=17,
    needs=("mnist",),
)
