"""The leaky integrate-and-fire neuron with a synaptic current, in discrete time."""

from __future__ import annotations

from dataclasses import dataclass

from beyondprop import _checks


@dataclass(frozen=True)
class CubaLIF:
    """A current-based leaky integrate-and-fire neuron.

    In every step, from a state of zero: the membrane v and the current p leak, p takes up what arrives, v takes up
    `p / tau_syn`, is held at 0 in refraction, and fires where it is above the threshold, which resets it to 0. The current is
    not reset.

    Attributes:
        tau_mem: time constant of the membrane, in steps, >= 1.
        tau_syn: time constant of the current, in steps, >= 1.
        threshold: of firing, > 0.
        refractory: steps after a spike in which the membrane is held at 0.
        delay: steps from a spike to its arrival, >= 0.
        dt: length of a step in seconds, for export.

    Raises:
        ValueError: for a number outside of these ranges, by its name.

    Source: Jin, Zhang & Li, NeurIPS 2018, arXiv 1805.07866, section 2 and the authors' code.
    """

    tau_mem: float = 16.0
    tau_syn: float = 2.0
    threshold: float = 1.0
    refractory: int = 0
    delay: int = 1
    dt: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("tau_mem", "tau_syn"):
            if not _checks.positive(name, getattr(self, name)) >= 1.0:
                raise ValueError(
                    f"{name} must be >= 1 step, below which a state changes its sign, got {getattr(self, name)!r}."
                )
        _checks.positive("threshold", self.threshold)
        _checks.positive("dt", self.dt)
        _checks.at_least("refractory", self.refractory, 0)
        _checks.at_least("delay", self.delay, 0)

    def most_spikes(self, steps: int) -> int:
        """Return how often the neuron can fire in so many steps, into the first of which nothing has come by its delay."""
        return -(-max(steps - self.delay, 0) // (self.refractory + 1))
