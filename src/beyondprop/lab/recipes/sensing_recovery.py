"""Jacobian sensing on synthetic boxes: calls and errors against sparsity, symmetry, noise and corrupted calls."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from beyondprop.errors import SensingWarning
from beyondprop.func import sensing
from beyondprop.lab.recipes._base import Context, Recipe, Row
from beyondprop.lab.recipes._drawing import panels
from beyondprop.lab.recipes._kept import Kept
from beyondprop.lab.recipes._synthetic_boxes import Box, random_rows, sensed, symmetric
from beyondprop.nn import BlackBox

SEEDS = (0, 1, 2)
PER_ROW = (1, 2, 3, 5, 8, 12, 16)
NOISES = (1e-5, 1e-4, 1e-3, 1e-2)
CORRUPTED = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
BATCHES, PROBES = (1, 4, 16, 64), (6, 8, 12, 20, 30)
QUICK = {"PER_ROW": (3,), "NOISES": (1e-3,), "CORRUPTED": (0.2,), "BATCHES": (64,), "PROBES": (8,)}
FAINT = 1e-4
TABLED = {"nonzeros": (5, 16), "noise": (1e-4, 1e-2), "corrupted": (0.1, 0.2, 0.4), "probes": 12}
"""Of what the figure has, what the table shows, too."""

NOISY = f"LP decoding, noise {FAINT:g} in the others"


# ---- what is measured ----------------------------------------------------------------------------------------------------


def of_sparsity(count: int, seed: int, n: int = 100) -> dict[str, dict[str, float]]:
    """Sense with a pattern, by regression and by colouring, and without one."""
    weights = random_rows(n, count, seed)
    known: dict[str, Any] = {"pattern": weights}
    return {
        "regression": sensed(Box(weights), seed, method="regression", **known),
        "colouring": sensed(Box(weights), seed, method="coloring", **known),
        "auto": sensed(Box(weights), seed, **known),
        "l1": sensed(Box(weights), seed, sparsity=count),
    }


def of_symmetry(shape: str, seed: int) -> dict[str, dict[str, float]]:
    """Sense a symmetric Jacobian as such, and as any with its pattern."""
    weights = symmetric(shape, seed)
    known: dict[str, Any] = {"pattern": weights}
    return {
        "symmetric": sensed(Box(weights, symmetric=True), seed, structure="symmetric", **known),
        "regression": sensed(Box(weights, symmetric=True), seed, method="regression", **known),
        "colouring": sensed(Box(weights, symmetric=True), seed, method="coloring", **known),
    }


def of_noise(noise: float, seed: int) -> dict[str, dict[str, float]]:
    """Sense a box whose noise is known: 100 outputs of 5 inputs each."""
    weights = random_rows(100, 5, seed)
    known, told = {"pattern": weights}, {"noise": noise}
    ways: dict[str, dict[str, Any]] = {
        "regression": {"method": "regression", **known},
        "regression, 20 probes": {"method": "regression", "probes": 20, **known},
        "colouring": {"method": "coloring", **known},
        "dense": {"method": "dense"},
        "l1": {"sparsity": 5},
        "SPSA": {"method": "spsa"},
    }
    return {name: sensed(Box(weights, noise=noise, seed=seed), seed, **told, **own) for name, own in ways.items()}


def of_corruption(share: float, seed: int) -> dict[str, dict[str, float]]:
    """Sense a box that returns garbage for a share of its calls, along 40 probes."""
    weights = random_rows(100, 5, seed)
    known: dict[str, Any] = {"pattern": weights, "probes": 40}
    ways: dict[str, dict[str, Any]] = {
        "LP decoding": {"method": "robust"},
        NOISY: {"method": "robust", "noise": FAINT},
        "least squares": {"method": "regression"},
    }
    found = {}
    for name, own in ways.items():
        box = Box(weights, noise=own.get("noise", 0.0), corrupted=share, seed=seed)
        found[name] = sensed(box, seed, **known, **own)
    return found


def of_discovery(batch: int, probes: int, seed: int) -> float:
    """Return the share of 200 rows whose 5 places are found along so many probes a sample."""
    weights = random_rows(200, 5, seed)
    x = torch.from_numpy(np.random.default_rng([seed, 5]).standard_normal((batch, 200)))
    found = sensing.detect_pattern(Box(weights), x, probes=probes, sparsity=5).pattern.mask()
    return float((found == torch.from_numpy(weights.toarray() != 0)).all(1).double().mean())


def discovered(noise: float, seed: int) -> dict[str, float]:
    """Find a pattern over a batch of 64 with as many probes as are asked for.

    Returns:
        Probes a sample, calls a sample, shares of exact rows and of true places that were found, false places a row.
    """
    weights = random_rows(200, 5, seed)
    box, true = Box(weights, noise=noise, seed=seed), torch.from_numpy(weights.toarray() != 0)
    x = torch.from_numpy(np.random.default_rng([seed, 5]).standard_normal((64, 200)))
    detection = sensing.detect_pattern(box, x, sparsity=5, noise=noise or None)
    found = detection.pattern.mask()
    return {
        "probes": detection.probes,
        "calls": box.calls / 64,
        "exact": float((found == true).all(1).double().mean()),
        "true": float((found & true).sum() / true.sum()),
        "false": float((found & ~true).sum() / 200),
    }


def audited(seed: int) -> dict[str, int]:
    """Return, for each method, calls of a forward and a backward pass that the box counted, less those that were promised."""
    weights, rows = random_rows(40, 3, seed), 16
    x = torch.from_numpy(np.random.default_rng([seed, 5]).standard_normal((rows, 40)))
    known: dict[str, Any] = {"pattern": weights}
    ways: dict[str, dict[str, Any]] = {
        **{name: {"method": name, **known} for name in ("coloring", "regression", "robust", "rainbow")},
        "forward differences": {"difference": "forward", **known},
        "dense": {"method": "dense"},
        "l1": {"sparsity": 3},
        "spsa": {"method": "spsa"},
    }
    found = {}
    for name, own in ways.items():
        box = Box(weights)
        layer = BlackBox(box, **own)
        given = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SensingWarning)
            layer(given).square().sum().backward()
        assert layer.plan is not None
        found[name] = box.calls - rows * (1 + layer.plan.calls)
    return found


# ---- the table -----------------------------------------------------------------------------------------------------------


def measure(context: Context) -> tuple[Sequence[Row], dict[str, Any]]:
    """Measure all of it with every seed."""
    chosen = {name: QUICK[name] if context.quick else globals()[name] for name in QUICK}
    seeds = SEEDS[:1] if context.quick else SEEDS
    kept = Kept(context.out / "measured.json", {"seeds": seeds, **chosen})

    def each(key: str, run: Callable[..., Any], *arguments: Any) -> list[Any]:
        context.say(key)
        return [kept.get(f"{key} / {seed}", partial(run, *arguments, seed)) for seed in seeds]

    sparsity = {count: each(f"{count} nonzeros a row", of_sparsity, count) for count in chosen["PER_ROW"]}
    ten = each("10 nonzeros a row, n = 200", lambda count, seed: of_sparsity(count, seed, 200), 10)
    shapes = {shape: each(f"symmetric, {shape}", of_symmetry, shape) for shape in ("arrow", "band", "grid")}
    noise = {sigma: each(f"noise {sigma:g}", of_noise, sigma) for sigma in chosen["NOISES"]}
    corrupted = {share: each(f"{share:.0%} of calls corrupted", of_corruption, share) for share in chosen["CORRUPTED"]}
    places = {
        batch: {count: each(f"batch {batch}, {count} probes", of_discovery, batch, count) for count in chosen["PROBES"]}
        for batch in chosen["BATCHES"]
    }
    found = each("pattern of a batch of 64", discovered, 0.0)
    blurred = {
        sigma: each(f"pattern of a batch of 64, noise {sigma:g}", discovered, sigma) for sigma in chosen["NOISES"]
    }
    single = each("float32", _in_float32)
    audit = each("audit", audited)

    rows = [
        *_exact("n = m = 100, 3 nonzeros a row", sparsity[3], "auto", calls=8, power=-9),
        *_exact("n = m = 200, 10 nonzeros a row", ten, "auto", probes=12, power=-8),
        _row("n = m = 200, 10 nonzeros a row: colouring", ten, "colouring", "probes"),
        *_exact("n = m = 100, symmetric arrow", shapes["arrow"], "symmetric", probes=3, power=-9),
        _row("n = m = 100, symmetric arrow: colouring", shapes["arrow"], "colouring", "probes"),
    ]
    rows += [
        _row(f"n = m = 100, symmetric {shape}: {way}", shapes[shape], way, "probes")
        for shape in ("band", "grid")
        for way in shapes[shape][0]
    ]
    for count in TABLED["nonzeros"]:
        for way in ("regression", "colouring", "l1"):
            label = f"n = m = 100, {count} nonzeros a row: {way}{', pattern not known' * (way == 'l1')}"
            rows += [_row(label, sparsity[count], way, "calls")] if count in sparsity else []
    rows += [
        Row(
            "pattern of a batch of 64, n = 200, 5 nonzeros a row: found by",
            tuple(one["probes"] for one in found),
            "probes a sample",
            at_most=8,
            digits=1,
        ),
        Row("the same: rows that are exact", tuple(100 * one["exact"] for one in found), "%", at_least=100, digits=1),
    ]
    for batch, by_probes in places.items():
        values = tuple(100 * value for value in by_probes.get(TABLED["probes"], ()))
        rows += (
            [Row(f"batch of {batch}, {TABLED['probes']} probes: rows that are exact", values, "%")] if values else []
        )
    tabled = [sigma for sigma in noise if sigma in TABLED["noise"] or context.quick]
    for sigma, values in ((sigma, blurred[sigma]) for sigma in tabled):
        label = f"pattern of a batch of 64, noise {sigma:g}:"
        rows += [
            Row(f"{label} found by", tuple(one["probes"] for one in values), "probes a sample", digits=1),
            Row(f"{label} places that were found", tuple(100 * one["true"] for one in values), "%"),
            Row(f"{label} false places", tuple(one["false"] for one in values), "a row"),
        ]
    for share, values in ((share, corrupted[share]) for share in corrupted if share in TABLED["corrupted"]):
        for way in values[0]:
            own: dict[str, Any] = {"digits": {"LP decoding": 10, NOISY: 3}.get(way, 0)}
            if (share, way) == (0.2, "LP decoding"):
                own["at_most"] = 0.1
            label = f"{share:.0%} of calls corrupted, 40 probes: error of {way}"
            rows.append(_row(label, values, way, "error", -2, **own))
    rows.append(_row("float32 box, 3 nonzeros a row: error", single, "auto", "error", -4, at_most=2.0))
    for name in audit[0]:
        counts = tuple(float(one[name]) for one in audit)
        rows.append(Row(f"{name}: calls counted less promised", counts, at_least=0, at_most=0, digits=0))
    for sigma in tabled:
        for way in noise[sigma][0]:
            calls = statistics.median(one[way]["calls"] for one in noise[sigma])
            label = f"noise {sigma:g}, 5 nonzeros a row: error of {way}, {calls:g} calls"
            rows.append(_row(label, noise[sigma], way, "error", -2))
    _draw(context, sparsity, noise, places, corrupted)
    return rows, {"seeds": list(seeds)}


def _in_float32(seed: int) -> dict[str, dict[str, float]]:
    weights = random_rows(100, 3, seed)
    return {"auto": sensed(Box(weights), seed, dtype=torch.float32, pattern=weights)}


def _row(
    label: str, found: Sequence[Mapping[str, Any]], way: str, key: str, power: int | None = None, **own: Any
) -> Row:
    """Return the row of one number; an error is in units of a power of ten."""
    unit = {None: key, -2: "%"}.get(power, f"x 1e{power}")
    values = tuple(one[way][key] / 10.0 ** (power or 0) for one in found)
    return Row(label, values, unit, **{"digits": 0 if power is None else 2, **own})


def _exact(
    label: str,
    found: Sequence[Mapping[str, Any]],
    way: str,
    *,
    power: int,
    calls: int | None = None,
    probes: int | None = None,
) -> list[Row]:
    """Return the rows of what must be exact from few calls."""
    key, most = ("calls", calls) if calls is not None else ("probes", probes)
    return [
        _row(label, found, way, key, at_most=most),
        _row(f"{label}: error", found, way, "error", power, at_most=1.0, digits=3),
    ]


# ---- the figure ----------------------------------------------------------------------------------------------------------

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def _draw(
    context: Context,
    sparsity: Mapping[int, Any],
    noise: Mapping[float, Any],
    places: Mapping[int, Mapping[int, Sequence[float]]],
    corrupted: Mapping[float, Any],
) -> None:
    titles = [
        "calls for one Jacobian, n = m = 100",
        "relative error, 5 nonzeros a row",
        "rows whose places are found, n = 200 (%)",
        "relative error, 40 probes",
    ]
    names = {
        "l1": "pattern not known, l1",
        "colouring": "pattern known, colouring",
        "regression": "pattern known, regression",
    }
    with panels(context, 2, 2, size=(12, 8.5), titles=titles) as grid:
        first, second, third, fourth = grid.flat
        for (way, label), color in zip(names.items(), COLORS, strict=False):
            _curve(first, sparsity, way, "calls", color, label)
        first.axhline(200, color="#777777", linestyle=(0, (1.2, 1.2)), label="dense")
        first.set_xlabel("nonzeros a row")
        for way, color in zip(next(iter(noise.values()))[0], COLORS, strict=False):
            calls = statistics.median(one[way]["calls"] for values in noise.values() for one in values)
            _curve(second, noise, way, "error", color, f"{way} ({calls:g} calls)")
        second.set(xscale="log", yscale="log", xlabel="standard deviation of the noise of every output")
        for (batch, found), color in zip(places.items(), COLORS, strict=False):
            middle = {count: 100 * statistics.median(values) for count, values in found.items()}
            third.plot(list(middle), list(middle.values()), color=color, marker="o", label=f"batch of {batch}")
        third.set(xlabel="probes a sample", ylim=(-3, 103))
        for way, color in zip(next(iter(corrupted.values()))[0], COLORS, strict=False):
            _curve(fourth, {100 * share: values for share, values in corrupted.items()}, way, "error", color, way)
        fourth.set(yscale="log", xlabel="corrupted calls (%)")
        places_of = ("center left", "lower right", "lower right", (0.45, 0.62))  # where no curve is
        second.set_ylim(1e-6)
        for panel, place in zip(grid.flat, places_of, strict=True):
            panel.legend(fontsize=8, loc=place)


def _curve(panel: Any, found: Mapping[Any, Any], way: str, key: str, color: str, label: str) -> None:
    """Draw medians over seeds, and their range as a band."""
    values = {x: sorted(one[way][key] for one in ones) for x, ones in found.items()}
    places = list(values)
    panel.plot(places, [statistics.median(v) for v in values.values()], color=color, marker="o", label=label)
    low, high = [v[0] for v in values.values()], [v[-1] for v in values.values()]
    panel.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)


RECIPE = Recipe(
    title="Jacobian sensing: calls and errors on synthetic boxes",
    source="Choromanski & Sindhwani, NeurIPS 2017, the synthetic recovery of its experiments; its numbers are not at hand",
    about=(
        "One Jacobian of tanh(W sin(x)) at a random point from calls alone, against the closed form in the Frobenius norm: "
        "with W's pattern known or not, symmetric, with noise, and with calls that return garbage of scale 50; three seeds of "
        "W, point and noise. What is asked for are this library's own bounds. A probe is two calls, ahead and behind; where "
        "there is noise, calls include those that measure curvature, and where the pattern is not known, that of the value."
    ),
    measure=measure,
    minutes=2,
)
