"""Calls that fail, return what is no number, or other things than before: retried, done without or named; never passed on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Smooth, far, points, random_pattern
from torch import Tensor

from beyondprop.errors import BlackBoxError, CallBudgetExceededError, NonFiniteError
from beyondprop.func.sensing import detect_pattern, jacobian, verify, vjp
from beyondprop.nn import BlackBox

MASK = random_pattern(8, 8, 2)
SMOOTH = Smooth(MASK)


class Failing:
    """A box that fails in some of its calls, counted from 1: by an exception, or NaN in some row."""

    def __init__(self, times: Callable[[int], bool], how: str = "raise", row: int = 0) -> None:
        self.times, self.how, self.row, self.made = times, how, row, 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.made += 1
        y = SMOOTH(np.atleast_2d(x)).reshape(*x.shape[:-1], 8)
        if not self.times(self.made):
            return y
        if self.how == "raise":
            raise OSError("the licence server is gone")
        y[(self.row % len(y),) if y.ndim == 2 else ()] = np.nan if self.how == "nan" else np.inf
        return y


@pytest.mark.parametrize("how", ["raise", "nan", "inf"])
@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("method", ["coloring", "regression", "dense"])
def test_calls_are_made_again(how: str, vectorized: bool, method: str) -> None:
    box = Failing(lambda made: made in (1, 3), how)
    x = points(3, 8)
    found = jacobian(box, x, pattern=MASK, method=method, retries=2, vectorized=vectorized)
    assert far(found, SMOOTH.jacobian(x)) <= 1e-8


@pytest.mark.parametrize("vectorized", [True, False])
def test_what_is_made_again_is_counted(vectorized: bool) -> None:
    rows = Counted(Failing(lambda made: made == 2, "nan", row=1))
    box = rows if vectorized else (lambda row: rows(row[None])[0])
    layer = BlackBox(box, pattern=MASK, retries=1, vectorized=vectorized)
    x = points(3, 8).requires_grad_()
    layer(x).sum().backward()
    assert layer.plan is not None
    assert layer.stats.retried == 1
    assert layer.stats.total == rows.rows == 3 * (1 + layer.plan.calls) + 1


@pytest.mark.parametrize("how", ["raise", "nan", "inf"])
def test_a_call_that_goes_on_failing_is_named(how: str) -> None:
    what = "raised OSError: the licence server is gone" if how == "raise" else "returned NaN or Inf"
    with pytest.raises(BlackBoxError, match=what) as caught:
        jacobian(Failing(lambda made: True, how), points(3, 8), pattern=MASK)
    if how == "raise":
        assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(BlackBoxError, match="after 2 retries"):
        jacobian(Failing(lambda made: True, how), points(3, 8), pattern=MASK, retries=2)


def test_the_probe_is_named() -> None:
    """The 22nd row: of 3 samples and 8 inputs, that of sample 0, probe 7 ahead."""
    rows = Failing(lambda made: made == 22, "nan")
    with pytest.raises(BlackBoxError, match="sample 0, probe 7 of 8 ahead"):
        jacobian(rows, points(3, 8), pattern=MASK, method="dense", vectorized=False)


def test_a_masked_loss_names_the_sample_of_the_batch() -> None:
    def box(x: np.ndarray) -> np.ndarray:
        y = SMOOTH(x)
        y[(x[:, 0] > 6.9) & (x[:, 0] != 7.0)] = np.nan
        return y

    x = points(5, 8)
    x[3, 0] = 7.0
    leaf = x.requires_grad_()
    y = BlackBox(box, pattern=MASK)(leaf)
    with pytest.raises(BlackBoxError, match="sample 3, probe"):
        y[3].sum().backward()


def test_inputs_that_are_no_numbers_are_named_as_such() -> None:
    box = Counted(np.nan_to_num)
    for bad in (float("nan"), float("inf")):
        x = points(3, 8)
        x[1, 5] = bad
        with pytest.raises(NonFiniteError, match=r"Input 5 of sample 1 .* not called"):
            jacobian(box, x, pattern=torch.eye(8))
        with pytest.raises(NonFiniteError, match="Input 5 of sample 1"):
            BlackBox(box, pattern=torch.eye(8))(x)
    assert box.rows == 0


# ---- doing without -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_calls_that_are_missing_are_done_without(difference: str) -> None:
    box = Failing(lambda made: made in (9, 14, 25), "nan")
    layer = BlackBox(
        box, pattern=MASK, method="regression", probes=5, on_nan="drop", vectorized=False, difference=difference
    )
    x = points(4, 8).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.stats.dropped == (3 if difference == "central" else 2)
    assert far(x.grad, SMOOTH.jacobian(x.detach()).sum(1)) <= (1e-8 if difference == "central" else 1e-5)


def test_exceptions_are_done_without_too() -> None:
    box = Failing(lambda made: made % 9 == 8)
    x = points(4, 8)
    found = jacobian(box, x, pattern=MASK, method="regression", probes=6, on_nan="drop", vectorized=False)
    assert far(found, SMOOTH.jacobian(x)) <= 1e-8


def test_too_many_missing_calls_are_named() -> None:
    box = Failing(lambda made: made % 4 == 1, "nan")
    with pytest.raises(ValueError, match=r"usable probes do not determine output .* of sample .*: ask for more probes"):
        jacobian(box, points(4, 8), pattern=MASK, method="regression", on_nan="drop", vectorized=False)


@pytest.mark.parametrize("method", ["coloring", "dense"])
def test_methods_that_need_every_call_say_so(method: str) -> None:
    box = Failing(lambda made: made == 6, "nan")
    with pytest.raises(ValueError, match="needs every one: allow retries"):
        jacobian(box, points(4, 8), pattern=MASK, method=method, on_nan="drop", vectorized=False)


def test_a_mean_of_random_directions_does_without_too() -> None:
    box = Failing(lambda made: made in (7, 12), "nan")
    v = torch.ones(4, 8, dtype=torch.float64)
    found = vjp(box, points(4, 8), v, method="spsa", probes=8, on_nan="drop", vectorized=False)
    assert bool(found.isfinite().all())
    assert bool(found.any())


def _symmetric() -> Tensor:
    half = SMOOTH.matrix.triu()
    return half + half.triu(1).T


def test_tied_entries_do_without_too() -> None:
    matrix = _symmetric()
    inner = Failing(lambda made: made in (7, 20), "nan")
    options: dict[str, Any] = dict(pattern=matrix != 0, structure="symmetric", probes=6)
    found = jacobian(
        lambda row: row @ matrix.numpy() + 0 * inner(row), points(4, 8), on_nan="drop", vectorized=False, **options
    )
    assert far(found, matrix.expand_as(found)) <= 1e-7


def test_tied_entries_that_are_no_longer_determined_are_named() -> None:
    """A full symmetric matrix needs as many probes as it has rows: what it does to a direction left out is not seen."""
    matrix = _symmetric()
    inner = Failing(lambda made: made == 11, "nan")
    with pytest.raises(ValueError, match=r"sample 2 do not determine the tied entries.* more probes"):
        jacobian(
            lambda row: row @ matrix.numpy() + 0 * inner(row),
            points(4, 8),
            structure="symmetric",
            on_nan="drop",
            vectorized=False,
        )


def test_the_value_itself_cannot_be_done_without() -> None:
    layer = BlackBox(Failing(lambda made: made == 2, "nan"), pattern=MASK, on_nan="drop", vectorized=False)
    with pytest.raises(BlackBoxError, match=r"sample 1.*give retries="):
        layer(points(4, 8))


# ---- budget --------------------------------------------------------------------------------------------------------------


def test_retries_count_within_the_budget_and_keep_their_reason() -> None:
    box = Failing(lambda made: made > 1)
    layer = BlackBox(box, pattern=MASK, retries=9, max_calls=20)
    x = points(3, 8).requires_grad_()
    y = layer(x)
    with pytest.raises(CallBudgetExceededError) as caught:
        y.sum().backward()
    assert layer.stats.total <= 20
    assert isinstance(caught.value.__cause__ or caught.value.__context__, OSError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.calls, again.asked, str(again)) == (caught.value.calls, caught.value.asked, str(caught.value))


@pytest.mark.parametrize("call", [jacobian, detect_pattern, verify])
def test_every_function_keeps_the_budget(call: Callable[..., Any]) -> None:
    box = Counted(SMOOTH)
    with pytest.raises(CallBudgetExceededError, match="max_calls=7"):
        call(box, points(3, 8), max_calls=7)
    assert box.rows <= 7


# ---- what a box must not do ----------------------------------------------------------------------------------------------


def _returning(*results: Any) -> Callable[[Any], Any]:
    remaining = list(results)

    def box(x: np.ndarray) -> Any:
        made = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return made(x) if callable(made) else made

    return box


@pytest.mark.parametrize(
    ("results", "error", "match"),
    [
        ([lambda x: x.astype(int)], TypeError, "returned int64; it must return floats"),
        ([lambda x: x > 0], TypeError, "returned bool; it must return floats"),
        ([lambda x: x + 1j], TypeError, "returned complex128; it must return floats"),
        ([None], TypeError, "returned NoneType"),
        (["nothing"], TypeError, "must return floats"),
        ([()], TypeError, "returned nothing"),
        ([lambda x: x.sum()], ValueError, "vectorized=False"),
        ([lambda x: x[:-1]], ValueError, r"shape \(3, 8\) for 4 rows; it must return one result a row"),
        ([lambda x: x, lambda x: x[:, :5]], ValueError, r"shapes \(\(5,\),\) a row, and \(\(8,\),\) before"),
        ([lambda x: x, lambda x: (x, x)], ValueError, "they must stay"),
        ([lambda x: {"a": x}, lambda x: {"b": x}], ValueError, "they must stay"),
    ],
)
def test_what_a_box_must_not_return(results: list[Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        jacobian(_returning(*results), points(4, 8), method="dense")


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
@pytest.mark.parametrize("executor", [False, True])
def test_a_box_that_overwrites_its_input(arrays: str, executor: bool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def box(x: Any) -> Any:
        x *= 2
        return x

    x = points(4, 8)
    kept = x.clone()
    with ThreadPoolExecutor(2) as pool:
        options: dict[str, Any] = {"executor": pool} if executor else {}
        with pytest.raises(BlackBoxError, match="overwrites its input"):
            jacobian(box, x, pattern=torch.eye(8), arrays=arrays, debug=True, **options)
        # Without the check it works on a copy, and the user's tensor is left alone.
        found = jacobian(box, x, pattern=torch.eye(8), arrays=arrays, **options)
    assert torch.equal(x, kept)
    assert far(found[0], 2 * torch.eye(8)) <= 1e-8


def test_a_box_that_returns_its_input_or_one_buffer() -> None:
    buffer = np.empty((100, 8))

    def box(x: np.ndarray) -> np.ndarray:
        buffer[: len(x)] = x**2
        return buffer[: len(x)]

    x = points(4, 8).requires_grad_()
    layer = BlackBox(box, pattern=torch.eye(8))
    first = layer(x)
    kept = first.detach().clone()
    second = layer(x * 2)
    assert torch.equal(first, kept)
    (first + second).sum().backward()
    assert x.grad is not None
    assert far(x.grad, 2 * x.detach() + 8 * x.detach()) <= 1e-8
    assert torch.equal(BlackBox(lambda a: a)(x).detach(), x.detach())


@pytest.mark.parametrize(
    "kind", ["longdouble", ">f8", "fortran", "reversed", "broadcast", "masked", "lists", "float16"]
)
def test_arrays_of_all_kinds(kind: str) -> None:
    """What simulators return; the last is as good as half precision is."""
    made: dict[str, Callable[[np.ndarray], Any]] = {
        "fortran": np.asfortranarray,
        "reversed": lambda y: y[:, ::-1].copy()[:, ::-1],
        "broadcast": lambda y: np.broadcast_to(y, y.shape),
        "masked": lambda y: np.ma.masked_array(y, mask=False),
        "lists": np.ndarray.tolist,
    }
    change = made.get(kind, lambda y: y.astype(kind))
    x = points(3, 8)
    found = jacobian(lambda a: change(SMOOTH(a)), x, pattern=MASK)
    assert far(found, SMOOTH.jacobian(x)) <= (0.02 if kind == "float16" else 1e-8)


def test_a_row_of_plain_numbers_is_an_array() -> None:
    layer = BlackBox(lambda row: [row[0] ** 2, float(row[1]), 3.0 * row[0]], vectorized=False, pattern=torch.ones(3, 2))
    x = points(4, 2).requires_grad_()
    y = layer(x)
    assert isinstance(y, Tensor)
    assert y.shape == (4, 3)
    y.sum().backward()
    assert x.grad is not None
    assert far(x.grad, torch.stack([2 * x[:, 0] + 3, torch.ones(4)], 1)) <= 1e-8


def test_numbers_from_numpy_and_torch_are_numbers() -> None:
    x = points(3, 8)
    widest = MASK.sum(1).max() + 2
    for probes, noise in ((widest.numpy()[()], np.float32(1e-6)), (int(widest), torch.tensor(1e-6))):
        found = jacobian(SMOOTH, x, pattern=MASK, method="regression", probes=probes, noise=noise)
        assert far(found, SMOOTH.jacobian(x)) <= 1e-2
