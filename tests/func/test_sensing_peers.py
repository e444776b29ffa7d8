"""What users of other packages ask for in their trackers, one test each."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Counted, Smooth, far, points, random_pattern
from scipy.optimize._numdiff import approx_derivative
from scipy.sparse import csr_matrix

from beyondprop.func.sensing import Pattern, color_columns, detect_pattern, jacobian, verify
from beyondprop.nn import BlackBox

MASK = random_pattern(100, 100, 3)


def test_a_public_sparse_finite_difference_jacobian() -> None:
    """SciPy has one in a private module (scipy issue 14946): ours is the same matrix for fewer calls."""
    smooth, x = Smooth(MASK), points(1, 100)[0]
    theirs, ours = Counted(smooth), Counted(smooth)
    sparse: Any = approx_derivative(
        lambda row: theirs(row[None])[0], x.numpy(), method="3-point", sparsity=csr_matrix(MASK.numpy().astype(int))
    )
    found = jacobian(ours, x, pattern=csr_matrix(MASK.numpy()), layout="coo")
    right = smooth.jacobian(x[None])[0]
    assert far(torch.from_numpy(sparse.toarray()), right) <= 1e-8
    assert far(found.to_dense(), right) <= 1e-9
    assert ours.rows <= 8 < theirs.rows


def test_several_points_at_once() -> None:
    """SciPy's takes one point at a time: a batch is one call of a vectorised function here."""
    box = Counted(Smooth(MASK))
    jacobian(box, points(16, 100), pattern=MASK)
    assert box.times == 1


def test_probes_in_parallel() -> None:
    """scipy issue 22119, numdifftools issue 61."""
    barrier = threading.Barrier(6, timeout=20)

    def box(row: np.ndarray) -> np.ndarray:
        barrier.wait()  # lets six pass, and none alone
        return 2 * row

    with ThreadPoolExecutor(6) as executor:
        found = jacobian(
            box, points(3, 4), pattern=torch.eye(4), vectorized=False, executor=executor
        )  # 3 rows, 2 sides
    assert far(found[0], 2 * torch.eye(4)) <= 1e-8


def test_a_colouring_is_made_once_apart_from_evaluation_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """sparsejac pull request 25."""
    coloring = color_columns(MASK)
    seeds = coloring.seeds()
    smooth, x = Smooth(MASK), points(2, 100)
    h = 1e-6
    # By hand: the colouring is an object of its own, of which anybody can make a Jacobian.
    moved = smooth((x[:, None] + h * seeds).reshape(-1, 100).numpy()) - smooth(
        (x[:, None] - h * seeds).reshape(-1, 100).numpy()
    )
    along = torch.from_numpy(moved).reshape(2, coloring.count, 100) / (2 * h)
    pattern = coloring.pattern
    values = along[:, coloring.colors[pattern.columns], pattern.rows]
    assert far(values, smooth.jacobian(x)[:, pattern.rows, pattern.columns]) <= 1e-8

    layer = BlackBox(smooth, pattern=MASK, method="coloring")
    plan = layer.plan
    from beyondprop.func.sensing import plan as planning

    monkeypatch.setattr(planning, "color_columns", lambda *_: pytest.fail("coloured again"))
    for _ in range(3):
        layer(x.clone().requires_grad_()).sum().backward()
    assert layer.plan is plan


def test_detection_takes_far_less_than_full_jacobians_and_can_be_checked() -> None:
    """OpenMDAO detects from dense Jacobians; users ask for a detection that can be trusted."""
    box = Counted(Smooth(MASK))
    x = points(32, 100)
    found = detect_pattern(box, x)
    assert box.since() <= 32 * 2 * 25  # a dense one: 32 * 200
    assert found.pattern == Pattern(MASK)
    assert float(found.residual.max()) < 1e-4
    assert not len(found.unexplained)
    assert verify(box, points(4, 100, 7), pattern=found.pattern)


def test_a_simulator_inside_a_graph() -> None:
    """The many questions about NumPy in an `autograd.Function`: net, simulator, net, and one `backward`."""

    def simulator(state: np.ndarray) -> np.ndarray:
        """Fifty steps of a chain of coupled oscillators."""
        place, speed = np.split(state.copy(), 2, axis=1)
        for _ in range(50):
            pull = np.roll(place, 1, 1) + np.roll(place, -1, 1) - 2 * place
            speed = speed + 0.01 * (pull - np.sin(place))
            place = place + 0.01 * speed
        return np.concatenate([place, speed], 1)

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 12), BlackBox(simulator), torch.nn.Linear(12, 1)).double()
    x = points(32, 3)
    y = torch.sin(x.sum(1, keepdim=True))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_mean_of_random_directions_is_never_taken_in_silence() -> None:
    """tesseract-core's default is one whose error is larger than the Jacobian; here it is asked for, or warned of."""
    box = Smooth(MASK)
    with pytest.warns(UserWarning, match="expected relative error"):
        estimate = jacobian(box, points(1, 100))
    assert far(estimate, box.jacobian(points(1, 100))) > 1
    assert far(jacobian(box, points(16, 100), pattern="discover"), box.jacobian(points(16, 100))) <= 1e-8
