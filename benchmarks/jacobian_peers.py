"""Black boxes whose Jacobian is known, and what finds it from calls: this library and its peers, for `benchmarks/sensing.py`.

Every peer is asked in its own way for one Jacobian `(m, n)` at one point, or for one gradient `J^T v` where it gives no more.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize._numdiff import approx_derivative, group_columns

from beyondprop.errors import SensingWarning
from beyondprop.func import sensing

PACKAGES = ("scipy", "numdifftools", "tesseract-core", "openmdao", "TorchOpt", "torchzero", "asdex")
Array = np.ndarray

os.environ["OPENMDAO_REPORTS"] = "0"


@cache
def installed(package: str) -> str | None:
    """Return a package's version; None: it is not there, or does not import."""
    try:
        found = version(package)
        import_module(package.lower().replace("-", "_"))
    except (PackageNotFoundError, ImportError):
        return None
    return found


@dataclass(frozen=True, eq=False)
class Problem:
    """A function `R^n -> R^m` at a point: `tanh(W sin(x))`, or the gradient of a potential, whose Jacobian is symmetric.

    Attributes:
        title: one line.
        weights: W, `(m, n)`; its nonzeros are the pattern.
        x: the point, `(n,)`, in the precision of the box.
        symmetric: whether it is a gradient, `cos(x) * (W sin(x))`.
        noise: standard deviation of what is added to every output of every call.
    """

    title: str
    weights: sparse.csr_array
    x: Array
    symmetric: bool = False
    noise: float = 0.0

    def values(self, rows: Array) -> Array:
        """Return the outputs for rows `(N, n)`."""
        inner = (self.weights.astype(rows.dtype) @ np.sin(rows).T).T
        if self.symmetric:
            return np.cos(rows) * inner
        return np.tanh(inner)

    @property
    def jacobian(self) -> Array:
        """The Jacobian at the point, `(m, n)` float64."""
        x, weights = self.x.astype(np.float64), self.weights.toarray()
        if not self.symmetric:
            return (1 - np.tanh(weights @ np.sin(x)) ** 2)[:, None] * weights * np.cos(x)
        return np.cos(x)[:, None] * weights * np.cos(x) - np.diag(np.sin(x) * (weights @ np.sin(x)))


class Box:
    """A problem that counts its calls, one a row, for functions of rows, of one point, and of columns."""

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem, self.calls, self._rng = problem, 0, np.random.default_rng(seed)

    def __call__(self, rows: Array) -> Array:
        self.calls += len(rows)
        found = self.problem.values(np.asarray(rows, dtype=self.problem.x.dtype))
        noise = self.problem.noise
        return found + noise * self._rng.standard_normal(found.shape) if noise else found

    def one(self, x: Array) -> Array:
        """Return the outputs `(m,)` at a point `(n,)`."""
        return self(np.asarray(x)[None])[0]

    def columns(self, x: Array) -> Array:
        """Return the outputs `(m, ...)` at points `(n, ...)`."""
        found = self(x.reshape(len(x), -1).T).T
        return found.reshape(len(found), *x.shape[1:])


def random_rows(n: int, count: int, seed: int = 0) -> sparse.csr_array:
    """Return weights `(n, n)` with so many nonzeros in random places of every row."""
    rng = np.random.default_rng(seed)
    columns = np.concatenate([rng.choice(n, count, replace=False) for _ in range(n)])
    return sparse.csr_array((rng.standard_normal(n * count), (np.repeat(np.arange(n), count), columns)), shape=(n, n))


def banded(n: int, half: int = 1, seed: int = 0) -> sparse.csr_array:
    """Return symmetric weights `(n, n)` in a band."""
    return _symmetric(sensing.Pattern.banded(n, half, half).to_scipy(), seed)


def arrow(n: int, seed: int = 0) -> sparse.csr_array:
    """Return symmetric weights `(n, n)`: a row, a column and the diagonal."""
    found, rng = np.diag(np.random.default_rng(seed).standard_normal(n)), np.random.default_rng(seed + 1)
    found[0] = found[:, 0] = rng.standard_normal(n)
    return sparse.csr_array(found)


def grid(side: int, seed: int = 0) -> sparse.csr_array:
    """Return symmetric weights of a five-point grid of `side * side` points."""
    line, eye = sensing.Pattern.banded(side).to_scipy(), sparse.eye_array(side)
    return _symmetric(sparse.csr_array(sparse.kron(eye, line) + sparse.kron(line, eye)), seed)


def _symmetric(pattern: sparse.csr_array, seed: int) -> sparse.csr_array:
    upper = sparse.csr_array(sparse.triu(pattern), dtype=np.float64)
    upper.data = np.random.default_rng(seed).standard_normal(len(upper.data))
    return sparse.csr_array(upper + sparse.triu(upper, 1).T)


@dataclass(frozen=True)
class Peer:
    """One way to a Jacobian.

    Attributes:
        name: shown.
        run: from a problem, its box and `v`, to the Jacobian `(m, n)`, or the gradient `(n,)`.
        package: that it needs.
    """

    name: str
    run: Callable[[Problem, Box, Array], Any]
    package: str = "scipy"


def ours(name: str, **options: Any) -> Peer:
    """Return this library's `jacobian` with options."""

    def run(problem: Problem, box: Box, v: Array) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SensingWarning)
            found = sensing.jacobian(box, torch.from_numpy(problem.x), **options)
        return found.double().numpy()

    return Peer(f"beyondprop, {name}", run)


def ours_with_pattern(name: str, problem: Problem, **options: Any) -> Peer:
    """Return this library's `jacobian` with a problem's pattern."""
    return ours(name, pattern=problem.weights, **options)


def _scipy(name: str, method: str, *, with_pattern: bool = False, **options: Any) -> Peer:
    def run(problem: Problem, box: Box, v: Array) -> Array:
        pattern = problem.weights if with_pattern else None
        found: Any = approx_derivative(box.one, problem.x, method=method, sparsity=pattern, **options)
        return found.toarray() if sparse.issparse(found) else found

    return Peer(f"scipy approx_derivative, {name}", run)


def _scipy_public(problem: Problem, box: Box, v: Array) -> Array:
    return import_module("scipy.differentiate").jacobian(box.columns, problem.x).df


def _numdifftools(problem: Problem, box: Box, v: Array) -> Array:
    return import_module("numdifftools").Jacobian(box.one)(problem.x)


def _tesseract(algorithm: str, samples: int | None = None) -> Callable[[Problem, Box, Array], Array]:
    def run(problem: Problem, box: Box, v: Array) -> Array:
        runtime, pydantic = import_module("tesseract_core.runtime"), import_module("pydantic")
        kind = runtime.Float32 if problem.x.dtype == np.float32 else runtime.Float64
        field = (runtime.Differentiable[runtime.Array[(None,), kind]], ...)
        given, returned = (pydantic.create_model(name, **{name: field}) for name in ("x", "y"))

        def apply(inputs: Any) -> Any:
            return returned(y=box.one(np.asarray(inputs.x)))

        difference = import_module("tesseract_core.runtime.experimental").finite_difference_jacobian
        chosen = {"algorithm": algorithm, "num_samples": samples, "seed": 0}
        return difference(apply, given(x=problem.x), {"x"}, {"y"}, **chosen)["y"]["x"]

    return run


class OpenMDAO:
    """A component with coloured central differences, whose sparsity OpenMDAO finds itself."""

    def __init__(self, problem: Problem, box: Box) -> None:
        api = import_module("openmdao.api")

        class Component(api.ExplicitComponent):
            def setup(self) -> None:
                self.add_input("x", problem.x)
                self.add_output("y", shape=len(problem.jacobian))
                quiet = {"show_summary": False, "show_sparsity": False}
                self.declare_coloring("x", method="fd", form="central", step=1e-6, **quiet)

            def compute(self, inputs: Any, outputs: Any) -> None:
                outputs["y"] = box.one(inputs["x"])

        with tempfile.TemporaryDirectory() as folder, chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.root = api.Problem(reports=None)
            self.part = self.root.model.add_subsystem("part", Component())
            self.root.setup()
            self.root.final_setup()
            self.root.run_model()
            self.jacobian()

    def jacobian(self) -> Array:
        """Return the Jacobian from the calls that the colouring takes."""
        self.root.model.run_linearize()
        found = self.part._jacobian["y", "x"]
        return np.asarray(found.toarray() if sparse.issparse(found) else found)

    @property
    def pattern(self) -> Array:
        """What was found, `(m, n)` bool."""
        return self.part._coloring_info.coloring.get_dense_sparsity() != 0


def _openmdao(problem: Problem, box: Box, v: Array) -> Array:
    prepared = OpenMDAO(problem, box)
    box.calls = 0
    return prepared.jacobian()


def _openmdao_whole(problem: Problem, box: Box, v: Array) -> Array:
    return OpenMDAO(problem, box).jacobian()


def _torchopt(problem: Problem, box: Box, v: Array) -> Array:
    wrap = import_module("torchopt").diff.zero_order(
        distribution=lambda shape: torch.randn(shape, dtype=torch.from_numpy(problem.x).dtype),
        method="antithetic",
        num_samples=100,
        sigma=1e-4,
    )
    x = torch.from_numpy(problem.x).requires_grad_()
    wrap(lambda z: torch.as_tensor(v @ box.one(z.detach().numpy())))(x).backward()
    assert x.grad is not None
    return x.grad.numpy()


def _torchzero(problem: Problem, box: Box, v: Array) -> Array:
    tz = import_module("torchzero")
    x = torch.nn.Parameter(torch.from_numpy(problem.x).clone())
    optimizer = tz.Optimizer([x], tz.m.SPSA(h=1e-4, n_samples=100), tz.m.LR(1.0))
    optimizer.step(lambda backward=True: torch.as_tensor(v @ box.one(x.detach().numpy())))
    return problem.x - x.detach().numpy()  # the step is the gradient


DENSE = [
    _scipy("2-point", "2-point"),
    _scipy("3-point", "3-point"),
    Peer("scipy.differentiate.jacobian", _scipy_public),
    Peer("numdifftools.Jacobian", _numdifftools, "numdifftools"),
    Peer("tesseract-core, central", _tesseract("central"), "tesseract-core"),
    Peer("tesseract-core, forward", _tesseract("forward"), "tesseract-core"),
    Peer("tesseract-core, stochastic", _tesseract("stochastic"), "tesseract-core"),
    Peer("tesseract-core, stochastic, 50 samples", _tesseract("stochastic", 50), "tesseract-core"),
]
PATTERNED = [
    _scipy("2-point, sparsity", "2-point", with_pattern=True),
    _scipy("3-point, sparsity", "3-point", with_pattern=True),
]
COLORED = [
    Peer("OpenMDAO, coloured, once it is", _openmdao, "openmdao"),
    Peer("OpenMDAO, coloured, finding sparsity", _openmdao_whole, "openmdao"),
]
GRADIENTS = [
    Peer("TorchOpt zero_order, 100 samples", _torchopt, "TorchOpt"),
    Peer("torchzero SPSA, 100 samples", _torchzero, "torchzero"),
]


def scipy_at(step: float) -> list[Peer]:
    """Return SciPy's central differences at a step of one's own choice."""
    text = f"{step:g}"
    return [
        _scipy(f"3-point, step {text}", "3-point", abs_step=step),
        _scipy(f"3-point, sparsity, step {text}", "3-point", with_pattern=True, abs_step=step),
    ]


def colorings(pattern: sparse.csr_array) -> dict[str, Callable[[], int]]:
    """Return the peers' ways to group the columns of a pattern, each giving the number of groups."""
    found: dict[str, Callable[[], int]] = {
        "scipy group_columns": lambda: int(group_columns(pattern).max()) + 1,
    }
    if installed("openmdao"):
        color = import_module("openmdao.utils.coloring")._compute_coloring
        whole = sparse.coo_array(pattern != 0)
        found["OpenMDAO"] = lambda: color(whole, "fwd").total_solves()
    if installed("asdex"):
        asdex = import_module("asdex")
        rows, columns = (axis.astype(np.int32) for axis in pattern.nonzero())
        given = asdex.SparsityPattern.from_coo(rows, columns, pattern.shape)
        found["asdex color_cols"] = lambda: int(asdex.color_cols(given)[1])
    return found


def halved(problem: Problem) -> Problem:
    """Return the problem in float32."""
    return replace(problem, x=problem.x.astype(np.float32), weights=problem.weights.astype(np.float32))


def available(peers: Sequence[Peer]) -> list[Peer]:
    """Return the peers whose package is installed."""
    return [peer for peer in peers if installed(peer.package)]
