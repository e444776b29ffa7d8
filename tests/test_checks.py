"""What a message about an argument says: what was given, what is accepted, and which of it may have been meant."""

from __future__ import annotations

from typing import Any

import pytest

from beyondprop import _checks


@pytest.mark.parametrize(
    ("value", "end"),
    [("adma", "got 'adma'; perhaps you meant 'adam'."), ("xyz", "got 'xyz'."), (3, "got 3."), (None, "got None.")],
)
def test_one_of_names_what_is_accepted_and_what_is_close(value: object, end: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole message is compared
        _checks.one_of("rule", value, iter(("adam", "sgd", 7)))
    assert str(caught.value) == f"rule must be one of 'adam', 'sgd', 7, {end}"
    assert _checks.one_of("rule", 7, ("adam", 7)) == 7


def test_a_hint_is_the_closest_string_or_nothing() -> None:
    assert _checks.hint("mpl", ("cnn", "mlp")) == "; perhaps you meant 'mlp'"
    assert _checks.hint("mpl", ()) == _checks.hint(None, ("mlp",)) == _checks.hint("1", (1, 2)) == ""


@pytest.mark.parametrize("value", [True, False, float("nan"), float("inf"), -1.0, "1", None])
def test_a_number_is_finite_in_range_and_no_bool(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^lr must be a finite number > 0, got {value!r}\.$"):
        _checks.positive("lr", value)
    with pytest.raises(ValueError, match=rf"^decay must be a finite number >= 0, got {value!r}\.$"):
        _checks.non_negative("decay", value)
    assert (_checks.positive("lr", 1), _checks.positive("lr", 0.5), _checks.non_negative("decay", 0)) == (1, 0.5, 0)
