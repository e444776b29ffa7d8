"""Bad input: named, with what is accepted and the way out."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Smooth, points, random_pattern

from beyondprop.errors import SensingWarning
from beyondprop.func.sensing import detect_pattern, jacobian, verify, vjp
from beyondprop.nn import BlackBox

MASK = random_pattern(6, 9, 3)
SMOOTH = Smooth(MASK)
X = points(4, 9)

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "colouring"}, "method must be one of .*perhaps you meant 'coloring'"),
    ({"method": None}, "method must be one of"),
    ({"difference": "centre"}, "difference must be one of 'central', 'forward'"),
    ({"arrays": "jax"}, "arrays must be one of 'numpy', 'torch'"),
    ({"on_nan": "ignore"}, "on_nan must be one of 'raise', 'drop'"),
    ({"step": "small"}, "step must be one of 'auto'"),
    ({"step": 0}, "step must be a finite number > 0"),
    ({"noise": "measure"}, "noise must be one of 'estimate'"),
    ({"noise": -1.0}, "noise must be a finite number >= 0"),
    ({"probes": 0}, "probes must be an integer >= 1"),
    ({"probes": 2.5}, "probes must be an integer >= 1"),
    ({"sparsity": 0}, "sparsity must be an integer >= 1"),
    ({"retries": -1}, "retries must be an integer >= 0"),
    ({"max_calls": 0}, "max_calls must be an integer >= 1"),
    ({"method": "coloring"}, "method='coloring' needs a pattern"),
    ({"method": "regression"}, "method='regression' needs a pattern"),
    ({"method": "robust"}, "method='robust' needs a pattern"),
    ({"method": "rainbow"}, "method='rainbow' needs a pattern"),
    ({"method": "l1"}, "method='l1' needs sparsity"),
    ({"method": "l1", "pattern": MASK}, "leave pattern out, or take 'regression'"),
]


@pytest.mark.parametrize(("options", "match"), OPTIONS, ids=[str(o) for o, _ in OPTIONS[:-1]] + ["l1 with a pattern"])
def test_options_are_checked_where_they_are_given(options: dict[str, Any], match: str) -> None:
    box = Counted(SMOOTH)
    with pytest.raises(ValueError, match=match):
        BlackBox(box, **options)
    with pytest.raises(ValueError, match=match):
        jacobian(box, X, **options)
    assert box.rows == 0


@pytest.mark.parametrize(("name", "meant"), [("patern", "pattern"), ("noises", "noise"), ("excutor", "executor")])
def test_unknown_options_are_answered_with_the_known_ones(name: str, meant: str) -> None:
    for call in (
        lambda **o: BlackBox(SMOOTH, **o),
        lambda **o: jacobian(SMOOTH, X, **o),
        lambda **o: verify(SMOOTH, X, **o),
    ):
        with pytest.raises(
            TypeError, match=f"Unknown option '{name}'; perhaps you meant '{meant}'; accepted: pattern, "
        ):
            call(**{name: 1})


PATTERNS = [
    (MASK[:5], r"pattern must have the shape \(outputs, inputs\) = \(6, 9\), got \(5, 9\)"),
    (MASK[:, :7], r"pattern must have the shape \(outputs, inputs\) = \(6, 9\), got \(6, 7\)"),
    (MASK.T, r"pattern must have the shape \(outputs, inputs\) = .*, got \(9, 6\)"),
    (torch.cat([MASK, MASK]), r"pattern must have the shape \(outputs, inputs\) = \(6, 9\), got \(12, 9\)"),
]


@pytest.mark.parametrize(("pattern", "match"), PATTERNS)
@pytest.mark.parametrize("method", ["auto", "coloring", "regression", "dense"])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_pattern_of_another_shape(pattern: torch.Tensor, match: str, method: str, difference: str) -> None:
    options: dict[str, Any] = dict(pattern=pattern, method=method, difference=difference)
    with pytest.raises(ValueError, match=match):
        jacobian(SMOOTH, X, **options)
    for looked_at in (False, True):
        layer = BlackBox(SMOOTH, **options)
        if looked_at:
            assert layer.plan is not None
        with pytest.raises(ValueError, match=match):
            layer(X.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("pattern", [p for p, _ in PATTERNS])
def test_a_product_with_a_pattern_of_another_shape(pattern: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pattern must have the shape|v must have"):
        vjp(SMOOTH, X, torch.ones(4, 6, dtype=torch.float64), pattern=pattern)


def test_too_few_probes() -> None:
    with pytest.raises(
        ValueError, match=r"probes must be at least 3, the largest number of nonzeros in a row .* got 2"
    ):
        jacobian(SMOOTH, X, pattern=MASK, probes=2)
    with pytest.raises(ValueError, match=r"takes as many probes as there are colours, .* got 2"):
        jacobian(SMOOTH, X, pattern=MASK, method="coloring", probes=2)
    for named in ("method", "pattern"):
        options: dict[str, Any] = {named: "dense"}
        with pytest.raises(ValueError, match="probes"):
            jacobian(SMOOTH, X, probes=5, **options)


def test_probes_that_are_asked_for_are_made() -> None:
    """More than there are colours: to average noise, which colouring cannot."""
    layer = BlackBox(SMOOTH, pattern=MASK, probes=8)
    assert layer.plan is not None
    assert (layer.plan.method, layer.plan.probes) == ("regression", 8)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (X.numpy(), TypeError, "x must be a tensor, got ndarray; torch.from_numpy makes one"),
        (X.tolist(), TypeError, "x must be a tensor"),
        (torch.tensor(1.0), ValueError, r"x must have the shape \(n,\) or \(N, n\), got \(\)"),
        (X[None], ValueError, r"x must have the shape \(n,\) or \(N, n\), got \(1, 4, 9\)"),
        (X[:0], ValueError, "batch is empty"),
        (X.long(), TypeError, "int64; .* must be floats"),
        (X > 0, TypeError, "bool; .* must be floats"),
        (X + 1j, TypeError, "complex128"),
    ],
)
def test_points_that_are_none(x: Any, error: type[Exception], match: str) -> None:
    for call in (jacobian, verify, detect_pattern):
        with pytest.raises(error, match=match):
            call(SMOOTH, x)


@pytest.mark.parametrize(
    ("v", "match"),
    [
        (torch.ones(4, 5), "v must have 6 numbers a point"),
        (torch.ones(3, 6), "v must have a row for each of 4 points"),
        (torch.ones(6), "v must have a row for each of 4 points"),
    ],
)
@pytest.mark.parametrize("pattern", [MASK, None])
def test_cotangents_of_another_shape(v: torch.Tensor, match: str, pattern: Any) -> None:
    with pytest.raises(ValueError, match=match):
        vjp(SMOOTH, X, v.double(), pattern=pattern)


@pytest.mark.parametrize("fn", [None, 3, "simulate", np.ones(3)])
def test_functions_that_are_none(fn: Any) -> None:
    with pytest.raises(TypeError, match="fn must be callable"):
        jacobian(fn, X)
    with pytest.raises(TypeError, match="fn must be callable"):
        BlackBox(fn)


def test_layers_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="out_features=5 outputs, got 6"):
        BlackBox(SMOOTH, 5, pattern=MASK)
    with pytest.raises(ValueError, match="returned 6 numbers a row, and out_features=5"):
        BlackBox(SMOOTH, 5)(X)
    with pytest.raises(ValueError, match="out_features must be an integer >= 1"):
        BlackBox(SMOOTH, 0)
    with pytest.raises(ValueError, match="argnums names input 2, and the black box got 1"):
        BlackBox(SMOOTH, argnums=2)(X)
    with pytest.raises(TypeError, match="got no input"):
        BlackBox(SMOOTH)()


def test_inputs_of_another_width_than_before() -> None:
    layer = BlackBox(lambda a: a.sum(1, keepdims=True) ** 2)
    layer(points(2, 3).requires_grad_()).sum().backward()
    with pytest.raises(ValueError, match=r"3.* 5|5.* 3"):
        layer(points(2, 5).requires_grad_()).sum().backward()


def test_a_wide_box_of_which_nothing_is_known_is_warned_of() -> None:
    mask = random_pattern(40, 40, 3)
    with pytest.warns(
        SensingWarning, match=r"40 inputs.* 7 random directions.* relative error of 2\.4.*pattern='discover'"
    ):
        jacobian(Smooth(mask), points(2, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jacobian(Smooth(mask), points(2, 40), method="spsa")
        jacobian(Smooth(mask), points(2, 40), method="dense")
        jacobian(SMOOTH, X)


def test_layouts_are_named() -> None:
    with pytest.raises(ValueError, match="layout must be one of 'dense', 'coo', got 'csr'"):
        jacobian(SMOOTH, X, layout="csr")
