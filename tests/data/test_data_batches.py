from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beyondprop.data import batches


def _rows(epoch: Iterator[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """The row numbers of each batch, checking that x and y stay together."""
    result = []
    for x, y in epoch:
        assert torch.equal(x[:, 0], y.float())
        result.append(y.tolist())
    return result


def _data(rows: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(rows)
    return y.float()[:, None].expand(-1, 3).contiguous(), y


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 45),
    seed=st.integers(0, 5),
    drop=st.booleans(),
    data=st.data(),
)
def test_an_epoch_has_every_row_once_and_start_cuts_its_head(
    rows: int, size: int, seed: int, drop: bool, data: st.DataObject
) -> None:
    drop = drop and size <= rows
    x, y = _data(rows)
    epoch = _rows(batches(x, y, size, generator=torch.Generator().manual_seed(seed), drop_last=drop))
    sizes = [size] * (rows // size) + ([] if drop or rows % size == 0 else [rows % size])
    assert [len(batch) for batch in epoch] == sizes
    seen = [row for batch in epoch for row in batch]
    assert len(set(seen)) == sum(sizes)
    start = data.draw(st.integers(0, len(sizes)))
    again = batches(x, y, size, generator=torch.Generator().manual_seed(seed), drop_last=drop, start=start)
    assert _rows(again) == epoch[start:]


def test_order_comes_from_the_generator_alone() -> None:
    x, y = _data(50)
    generator = torch.Generator().manual_seed(3)
    first, second = (_rows(batches(x, y, 16, generator=generator)) for _ in range(2))
    assert first != second
    torch.manual_seed(99)  # the global state must not matter
    assert _rows(batches(x, y, 16, generator=torch.Generator().manual_seed(3))) == first
    assert _rows(batches(x, y, 16, generator=torch.Generator().manual_seed(4))) != first
    assert _rows(batches(x, y, 20, generator=None)) == [[*range(20)], [*range(20, 40)], [*range(40, 50)]]


def test_the_generator_advances_once_per_epoch_whatever_is_consumed() -> None:
    x, y = _data(30)
    whole, part, unused = (torch.Generator().manual_seed(1) for _ in range(3))
    list(batches(x, y, 7, generator=whole))
    next(batches(x, y, 7, generator=part))
    batches(x, y, 7, generator=unused)
    assert torch.equal(whole.get_state(), part.get_state())
    assert torch.equal(whole.get_state(), unused.get_state())
    assert not torch.equal(whole.get_state(), torch.Generator().manual_seed(1).get_state())


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_batches_are_copies(generator: torch.Generator | None) -> None:
    x, y = _data(4)
    before = x.clone()
    for batch_x, batch_y in batches(x, y, 2, generator=generator):
        batch_x.zero_()
        batch_y.zero_()
    assert torch.equal(x, before)
    assert y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(0, 3), "y": torch.zeros(0)}, ValueError, "empty"),
        ({"y": torch.zeros(9)}, ValueError, "10 rows and y has 9"),
        ({"x": [1, 2]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be an integer"),
        ({"start": -1}, ValueError, "start must be an integer >= 0, got -1"),
        ({"start": 5}, ValueError, "start must be <= 4, the number of batches in this epoch, got 5"),
        ({"start": 4, "drop_last": True}, ValueError, "start must be <= 3"),
        ({"batch_size": 11, "drop_last": True}, ValueError, "10 rows are fewer than batch_size=11"),
        ({"generator": 7}, TypeError, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_bad_arguments_are_refused_when_called(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    x, y = _data(10)
    arguments = {"x": x, "y": y, "batch_size": 3, "generator": None} | changes
    with pytest.raises(error, match=message):
        batches(**arguments)  # pyright: ignore[reportArgumentType]
