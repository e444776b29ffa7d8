"""The layer around a function that autograd cannot see: its backward pass senses the Jacobian from further calls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from beyondprop import _checks
from beyondprop.func.sensing.batch import flattened
from beyondprop.func.sensing.calls import Caller, Counts
from beyondprop.func.sensing.functional import LAYOUTS, settings_of
from beyondprop.func.sensing.patterns import Pattern
from beyondprop.func.sensing.plan import Plan
from beyondprop.func.sensing.sensor import Report, Sensor
from beyondprop.func.sensing.verification import Verification, check
from beyondprop.nn.blackbox.call import Call
from beyondprop.nn.blackbox.functions import Evaluate
from beyondprop.nn.blackbox.kept import packed, unpacked
from beyondprop.nn.blackbox.opaque import opaque, registered
from beyondprop.nn.blackbox.reuse import Reuse


class BlackBox(nn.Module):
    """A function of which only values are known, as a layer: NumPy code, a simulator, a compiled program, a service.

    The forward pass calls it once a sample. The backward pass finds each sample's Jacobian from as few further calls as its
    structure allows, see `plan`, and returns `J^T v`; where a sample's `v` is 0, it makes none. The sensing itself is done on
    the CPU in float64. Under `torch.compile` it is one opaque operation; `torch.func.vmap` joins its batch with the box's.

    Args:
        fn: takes rows `(N, ...)`, as NumPy arrays by default, for several inputs one array each, and returns an array, a tuple
            or a dictionary of arrays `(N, ...)`, always of the same shapes. It may have noise; with `seed_kwarg` it gets the
            same seed in all calls of one forward pass and its backward pass.
        out_features: numbers that it returns for a row; None: as many as it does.
        argnums: which of several inputs are differentiated; None: those that hold floats.
        refresh: how many backward passes a sample's Jacobian serves, as long as its inputs stay where they were; all samples
            of a batch are sensed then, also where their gradient is 0.
        refresh_within: how far they may move for that, relative to their size where it is above 1.
        generator: for probe directions; its state is not stored. None: those of a plan are always the same, random ones
            (`spsa`) come from torch's global state.
        **options: what is known of the Jacobian (`Wanted`): `pattern` (bool `(m, n)`, `scipy.sparse`, `"dense"` or
            `"discover"`), `structure`, `method`, `probes`, `sparsity`; how far probes go (`StepSettings`): `difference`,
            `step`, `noise`, `x_scale`, `bounds`; how `fn` is called (`CallSettings`): `arrays`, `vectorized`, `executor`,
            `retries`, `max_calls`, `on_nan`, `seed_kwarg`, `debug`. Several inputs and outputs count flat, one after the other.

    Attributes:
        costly: tells the laboratory that nothing is to be measured on the side.
        sizes: outputs and inputs of a row, once they are known.
        stands_in: whether it answers without a call of the box, while the structure of a model is looked at.

    Raises:
        TypeError, ValueError: for bad options here; for bad input, or a box that returns what it should not, in `forward`.
        NonFiniteError: if an input is NaN or Inf.
        BlackBoxError: if a call failed, or returned NaN or Inf.
        CallBudgetExceededError: if there would be more calls than `max_calls`.

    Source: Choromanski & Sindhwani, "On Blackbox Backpropagation and Jacobian Sensing", NeurIPS 2017; Curtis, Powell & Reid
    (1974) for colouring; Newsam & Ramsdell (1983) for regression.
    """

    costly = True

    def __init__(
        self,
        fn: Callable[..., Any],
        out_features: int | None = None,
        *,
        argnums: int | Sequence[int] | None = None,
        refresh: int = 1,
        refresh_within: float | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if out_features is not None:
            _checks.at_least("out_features", out_features, 1)
        wanted, steps, calls = settings_of(options)
        if isinstance(wanted.pattern, Pattern) and out_features not in (None, wanted.pattern.shape[0]):
            raise ValueError(
                f"pattern must have a row for each of out_features={out_features} outputs, got {wanted.pattern.shape[0]}."
            )
        self.out_features = out_features
        self.argnums = (argnums,) if isinstance(argnums, int) else None if argnums is None else tuple(argnums)
        if self.argnums is not None and (not self.argnums or len({*self.argnums}) < len(self.argnums)):
            raise ValueError(f"argnums must name one input or more, each once, got {argnums!r}.")
        if refresh > 1 and calls.seed_kwarg is not None:
            raise ValueError(
                "refresh > 1 does not go with seed_kwarg: a seed is that of one pass, and so are its Jacobians."
            )
        self.generator = generator
        self.reuse = Reuse(refresh, refresh_within)
        self.caller = Caller(fn, calls)
        self.sensor = Sensor(wanted, steps, generator)
        self.sizes: tuple[int, int] | None = None
        self.stands_in = False
        self.handle = registered(self)

    def forward(self, *inputs: Tensor) -> Any:
        """Call the box: from tensors `(N, ...)` to what `fn` returns, as tensors like the first that is differentiated.

        Raises:
            TypeError: if an input is no tensor, or one that is differentiated holds no floats.
            ValueError: if the batch is empty, inputs have unequal rows or lie outside the bounds, or `argnums` names none.
            NonFiniteError, BlackBoxError, CallBudgetExceededError: as above.
        """
        if torch.compiler.is_compiling():
            return opaque(self, list(inputs))
        if self.stands_in and len(inputs) == 1 and (found := self._stand_in(inputs[0])) is not None:
            return found
        call = Call(self)
        leaves = Evaluate.apply(call, *inputs)
        return self.structured(leaves if isinstance(leaves, tuple) else (leaves,))

    @property
    def can_stand_in(self) -> bool:
        """Whether it is known what its output looks like."""
        return self._output_shape() is not None

    def _output_shape(self) -> tuple[int, ...] | None:
        if self.caller.shapes is not None:
            return self.caller.shapes[0] if len(self.caller.shapes) == 1 else None
        known = self._known_sizes()
        outputs = self.out_features or (None if known is None else known[0])
        return None if outputs is None else (outputs,)

    def _stand_in(self, x: Tensor) -> Tensor | None:
        """Return numbers that follow an input, in the shape of the box's output, without a call; None: it is not known."""
        if (shape := self._output_shape()) is None:
            return None
        flat = x.flatten(1)
        place = torch.arange(math.prod(shape), device=x.device) % flat.shape[1]
        return (flat[:, place] + flat.mean(1, keepdim=True)).reshape(len(x), *shape)

    def new_call(self, seed: int | None = None) -> Call:
        """Return a forward pass that is to be made, by a seed where the box takes one."""
        return Call(self, seed)

    def structured(self, leaves: Sequence[Tensor]) -> Any:
        """Return outputs in the structure that `fn` returns them in."""
        return leaves[0] if self.caller.spec is None else tree_unflatten(list(leaves), self.caller.spec)

    @property
    def plan(self) -> Plan | None:
        """How the box is sensed: method, probes, calls a sample, and why; None as long as its size or pattern is not known."""
        if self.sensor.plan is None and (sizes := self._known_sizes()) is not None and not self.sensor.must_discover:
            self.sensor.prepare(*sizes)
        return self.sensor.plan

    def _known_sizes(self) -> tuple[int, int] | None:
        wanted = self.sensor.wanted
        if isinstance(wanted.pattern, Pattern):
            return wanted.pattern.shape
        if self.sensor.detection is not None:
            return self.sensor.detection.pattern.shape
        if wanted.structure is not None and not isinstance(wanted.structure, str):
            return tuple(wanted.structure.shape)  # type: ignore[return-value]
        return self.sizes

    @property
    def pattern(self) -> Pattern | None:
        """The pattern that is used, given or found; None: none, or not found yet."""
        return None if self.plan is None else self.plan.pattern

    @property
    def stats(self) -> Counts:
        """Calls so far, also of copies of this layer: they call the same box."""
        return self.caller.counts

    @property
    def info(self) -> Report:
        """Step, noise, condition number and residual, as they were when the box was sensed last."""
        return self.sensor.report

    @property
    def counters(self) -> dict[str, int]:
        """Calls in training, which the laboratory draws results against, and those in evaluation."""
        counts = self.stats
        return {"calls": counts.forward + counts.backward + counts.setup, "evaluation_calls": counts.evaluation}

    @torch.no_grad()
    def jacobian(self, *inputs: Tensor, layout: str = "dense") -> Tensor:
        """Return the Jacobian of every sample, `(N, m, n)`: all outputs and all inputs that are differentiated, flat.

        Args:
            *inputs: as for `forward`.
            layout: `"dense"`, or `"coo"`, sparse.
        """
        _checks.one_of("layout", layout, LAYOUTS)
        call = Call(self)
        if self.sensor.steps.difference == "forward" or self.caller.shapes is None:
            call.value(inputs)
        found = call.sensed(inputs)
        like = inputs[call.argnums(inputs)[0]]
        return (found.dense() if layout == "dense" else found.coo()).to(like.device, like.dtype)

    @torch.no_grad()
    def verify(self, *inputs: Tensor, n_probes: int = 3, tolerance: float = 1e-2) -> Verification:
        """Sense the Jacobian and compare it with derivatives along fresh directions: a pattern that lacks entries is found out.

        Args:
            *inputs: as for `forward`.
            n_probes: fresh directions a sample.
            tolerance: misfit that is accepted beyond noise, relative to an output's derivatives.
        """
        call = Call(self)
        leaves = call.value(inputs, "evaluation")
        jacobians = call.sensed(inputs, kind="evaluation")
        batch = call.batch(inputs)
        y = flattened(leaves)
        return check(self.sensor, batch, y, batch.precision, jacobians, n_probes, tolerance)

    def extra_repr(self) -> str:
        name = getattr(self.caller.fn, "__name__", type(self.caller.fn).__name__)
        how = self.sensor.wanted.method if self.sensor.plan is None else repr(self.sensor.plan)
        return f"{name}, out_features={self.out_features}, {how}"

    def get_extra_state(self) -> Tensor:
        return packed(self.stats, self.sensor)

    def set_extra_state(self, state: Tensor) -> None:
        unpacked(state, self.stats, self.sensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlackBox:
        """Return a layer around the same box: what is counted and budgeted is calls of the box, whichever copy makes them."""
        twin = type(self).__new__(type(self))
        sensor = copy.copy(self.sensor)
        sensor.report = copy.copy(sensor.report)
        memo[id(self)] = twin
        shared = {"caller": self.caller, "sensor": sensor, "generator": self.generator}
        nn.Module.__init__(twin)
        twin.__dict__.update({
            k: shared[k] if k in shared else copy.deepcopy(v, memo) for k, v in self.__dict__.items()
        })
        twin.handle = registered(twin)
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the layer back; its executor was left behind, and calls are made one by one."""
        super().__setstate__(state)
        self.handle = registered(self)
