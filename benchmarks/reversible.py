"""Memory, step time and accuracy of reversible chains, against depth and against other ways to save memory.

    python benchmarks/reversible.py [--parts memory nets exact rules time] [--rounds 9] > benchmarks/results/reversible.txt

Figures go to the standard output, progress to the standard error. Blocks are additive couplings of F, G = (BN-ReLU-conv3x3) x 2
on 32 + 32 channels. Every contender runs the very same modules, and its gradients are compared with those of plain autograd.
Peers are optional, `pip install 'beyondprop[benchmarks]'`; one that is missing is named and left out.

    kept     bytes that stand after the forward pass and did not before, the output among them (the profiler's memory events)
    saved    bytes that autograd was given to keep, each storage once, weights not counted (`saved_tensors_hooks`)
    peak     the most bytes that stood at once during a forward and a backward pass, without the gradients that stay in `.grad`

Times are CPU seconds of the process on one thread. Contenders take turns in one process; ratios are medians over rounds of the
ratio within a round. They are measured a second time with a C library that keeps what is freed (glibc's thresholds): the
difference is what page faults cost.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from standing import Standing, kept_and_peak, peak, saved
from step_time import measure, ratio
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beyondprop import AltMin, Codes, Credited, FeedbackAlignment
from beyondprop.nn import AdditiveCoupling, ReversibleSequential, gradient_angle, reconstruction_error, revnet, revnet38

MIB = 2**20
PARTS = ("memory", "nets", "exact", "rules", "time")
Functions = Sequence[tuple[nn.Module, nn.Module]]
Run = Callable[[Tensor], Tensor]

# glibc's: no block below 32 MiB, its limit, is mapped by itself, and nothing is trimmed.
HOLDING = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**36)}


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {text}", file=sys.stderr, flush=True)


@cache
def once(text: str) -> None:
    print(text, flush=True)


# ---- contenders ----------------------------------------------------------------------------------------------------------


def functions(depth: int, channels: int = 32) -> Functions:
    """Return F and G of each block."""

    def one() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        return nn.Sequential(*layers)

    return [(one(), one()) for _ in range(depth)]


def segment(part: Functions, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    for f, g in part:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return x1, x2


def halves(x: Tensor) -> Sequence[Tensor]:
    """Return the two streams, contiguous as in our chain: kernels round by the layout, and ReLUs near 0 follow."""
    return [half.contiguous() for half in x.chunk(2, 1)]


def stored(pairs: Functions) -> Run:
    return lambda x: torch.cat(segment(pairs, *halves(x)), 1)


def checkpointed(pairs: Functions, size: int) -> Run:
    """Return the chain in checkpointed segments of `size` blocks."""
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def run(x: Tensor) -> Tensor:
        streams: Any = halves(x)
        for part in parts:
            streams = checkpoint(segment, part, *streams, use_reentrant=False)
        return torch.cat(streams, 1)

    return run


def ours(pairs: Functions, mode: str) -> Run:
    return ReversibleSequential(*(AdditiveCoupling(f, g) for f, g in pairs), mode=mode)


def memcnn(pairs: Functions) -> Run:
    package: Any = importlib.import_module("memcnn")
    return nn.Sequential(*(package.InvertibleModuleWrapper(package.AdditiveCoupling(f, g)) for f, g in pairs))


def revtorch(pairs: Functions) -> Run:
    package: Any = importlib.import_module("revtorch")
    return package.ReversibleSequence(nn.ModuleList(package.ReversibleBlock(f, g) for f, g in pairs))


def revlib(pairs: Functions) -> Run:
    package: Any = importlib.import_module("revlib")
    return package.ReversibleSequential(*(function for pair in pairs for function in pair))


PEERS: dict[str, Callable[[Functions], Run]] = {"MemCNN": memcnn, "RevTorch": revtorch, "RevLib": revlib}


def contenders(pairs: Functions) -> dict[str, Run]:
    runs = {
        "stored": stored(pairs),
        "checkpoint, per block": checkpointed(pairs, 1),
        "checkpoint, sqrt(L)": checkpointed(pairs, math.isqrt(len(pairs))),
        "ours, inverse": ours(pairs, "inverse"),
        "ours, checkpoint": ours(pairs, "checkpoint"),
    }
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runs[name] = make(pairs)
        except ModuleNotFoundError as error:
            once(f"  {name} is left out: {error}; pip install 'beyondprop[benchmarks]'")
    return runs


class Problem:
    """The chain of a depth, its input and the cotangent of its output."""

    def __init__(self, depth: int) -> None:
        torch.manual_seed(0)
        self.pairs = functions(depth)
        self.x = torch.randn(16, 64, 24, 24, requires_grad=True)
        self.dy = torch.randn(16, 64, 24, 24)
        self.weights = [self.x, *(p for pair in self.pairs for function in pair for p in function.parameters())]

    def clear(self) -> None:
        for p in self.weights:
            p.grad = None

    def forward(self, run: Run) -> Tensor:
        return run(self.x.clone())  # MemCNN frees the memory of its input: everybody gets one that nobody else needs

    def backward(self, y: Tensor) -> None:
        y.backward(self.dy)

    def step(self, run: Run, *_: Tensor) -> None:
        self.clear()
        self.backward(self.forward(run))

    def gradient(self, run: Run) -> Tensor:
        self.step(run)
        found = torch.cat([p.grad.flatten() for p in self.weights if p.grad is not None])
        self.clear()
        return found


# ---- memory --------------------------------------------------------------------------------------------------------------


def memory(depths: Sequence[int]) -> None:
    print("\nactivation memory in MiB against depth: batch 16, 64 channels, 24x24 (one such tensor: 2.25 MiB)")
    for depth in depths:
        print(f"\n{depth:4} blocks{'':15} {'kept':>9} {'saved':>9} {'peak':>9}   gradient's error against stored")
        problem = Problem(depth)
        warm, fresh = contenders(problem.pairs), contenders(problem.pairs)
        right = problem.gradient(warm["stored"])
        for name, run in fresh.items():
            note(f"memory: {depth} blocks, {name}")
            error = float((problem.gradient(warm[name]) - right).norm() / right.norm())
            forward = partial(problem.forward, run)
            kept, highest = kept_and_peak(forward, problem.backward, problem.weights)
            # Peers keep tensors outside autograd's sight.
            held = "-" if name in PEERS else f"{saved(forward, problem.weights) / MIB:.2f}"
            row = f"  {name:24} {kept / MIB:>9.2f} {held:>9} {highest / MIB:>9.2f}   {error:.1e}"
            counted = (
                f"   counters: {run.counters['kept_bytes'] / MIB:.2f}" if isinstance(run, ReversibleSequential) else ""
            )
            print(row + counted, flush=True)


def networks() -> None:
    print("\nRevNets of n units a stage, widths 32-32-64-128, batch 20, 32x32; MiB, and ratio to 38 layers")
    print(f"{'':41}{'kept':>9} {'':>7} {'saved':>9} {'':>7} {'peak':>9}")
    x, y = torch.randn(20, 3, 32, 32), torch.randint(10, (20,))
    for mode in ("store", "checkpoint", "inverse"):
        base: list[int] = []
        units = {f"{12 * n + 2} layers": partial(revnet, (n, n, n), (32, 32, 64, 128)) for n in (3, 9, 18)}
        for name, make in {**units, "revnet38, last width 112": revnet38}.items():
            note(f"nets: {mode}, {name}")
            torch.manual_seed(0)
            model = make(num_classes=10, mode=mode)
            weights = [*model.parameters()]

            def forward(model: nn.Module = model) -> Tensor:
                return nn.functional.cross_entropy(model(x), y)

            kept_and_peak(forward, Tensor.backward, weights)  # warms up
            kept, highest = kept_and_peak(forward, Tensor.backward, weights)
            figures = [kept, saved(forward, weights), highest]
            base = base or figures
            row = " ".join(f"{a / MIB:>9.3f} {a / b:>7.3f}" for a, b in zip(figures, base, strict=True))
            print(f"  {mode + ', ' + name:38} {row}", flush=True)


# ---- time ----------------------------------------------------------------------------------------------------------------


def times(depth: int, rounds: int, allocator: str) -> None:
    print(f"\nstep time at {depth} blocks, {rounds} rounds; C library's allocator: {allocator}")
    problem = Problem(depth)
    plain = stored(problem.pairs)

    def run_twice(*_: Tensor) -> None:
        with torch.no_grad():
            problem.forward(plain)
        problem.step(plain)
        note("time: a round")

    steps: dict[str, Any] = {name: partial(problem.step, run) for name, run in contenders(problem.pairs).items()}
    steps["stored + a forward pass"] = run_twice
    seconds = measure(steps, [(problem.x, problem.dy)], rounds, time.process_time)
    bases = ["stored", "checkpoint, per block", *(["RevLib"] if "RevLib" in steps else [])]
    print(f"{'':26} {'seconds':>8} " + " ".join(f"{'/ ' + base:>23}" for base in bases))
    for name, each in seconds.items():
        row = " ".join(f"{ratio(seconds, name, base):>23.3f}" for base in bases)
        print(f"  {name:24} {sorted(each)[rounds // 2]:>8.3f} {row}", flush=True)


# ---- accuracy ------------------------------------------------------------------------------------------------------------


def conv_chain(depth: int, gain: float, norm: bool, **options: Any) -> ReversibleSequential:
    """Return a chain of couplings of one convolution each, on 16 + 16 channels."""
    torch.manual_seed(0)

    def function() -> nn.Module:
        conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        with torch.no_grad():
            conv.weight.mul_(gain)
        return nn.Sequential(*([nn.BatchNorm2d(16)] if norm else []), nn.ReLU(), conv)

    return ReversibleSequential(*(AdditiveCoupling(function(), function()) for _ in range(depth)), **options)


SETTINGS: dict[str, tuple[float, bool, torch.dtype, dict[str, Any]]] = {
    "float32, BN": (1, True, torch.float32, {}),
    "float32, BN, gain 3": (3, True, torch.float32, {}),
    "float32, no BN": (1, False, torch.float32, {}),
    "float32, no BN, gain 3": (3, False, torch.float32, {}),
    "bfloat16 streams, BN": (1, True, torch.bfloat16, {"stream_dtype": None}),
    "bfloat16, float32 streams, BN": (1, True, torch.bfloat16, {}),
    "float32, BN, exact_bits=12": (1, True, torch.float32, {"exact_bits": 12}),
    "float32, BN, gain 3, exact_bits=12": (3, True, torch.float32, {"exact_bits": 12}),
}


def exact(depths: Sequence[int]) -> None:
    print("\nrelative error of the reconstructed input, and angle between the gradients of modes inverse and store:")
    print("(BN-)ReLU-conv3x3 on 16 + 16 channels, batch 8, 16x16")
    print(" " * 36 + "".join(f"{f'{depth} blocks':>24}" for depth in depths))
    for name, (gain, norm, dtype, options) in SETTINGS.items():
        cells = ""
        for depth in depths:
            note(f"exact: {name}, {depth} blocks")
            model = conv_chain(depth, gain, norm, **options).to(dtype)
            x, dy = torch.randn(8, 32, 16, 16).to(dtype), torch.randn(8, 32, 16, 16)
            angle = gradient_angle(model, lambda y, dy=dy: (y.float() * dy).sum(), x)
            cells += f"{reconstruction_error(model, x):>14.1e} {angle:>8.1e}°"
        print(f"  {name:34}{cells}", flush=True)


# ---- learning rules ------------------------------------------------------------------------------------------------------


class Kept(nn.Module):
    """A coupling that a rule takes for any block, so that it stores what is inside."""

    def __init__(self, coupling: nn.Module) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, x: Tensor) -> Tensor:
        return self.coupling(x)


def classifier(depth: int, kind: str) -> nn.Module:
    torch.manual_seed(0)
    couplings = [AdditiveCoupling(f, g) for f, g in functions(depth, 16)]
    middle = [ReversibleSequential(*couplings)] if kind == "reversible" else [Kept(c) for c in couplings]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), *middle, *head)


def rules(depths: Sequence[int], rounds: int) -> None:
    print("\nlearning rules on a chain of F, G on 16 + 16 channels, batch 16, 24x24; MiB, step time against stored")
    print("(AltMin's peak has the weights' gradients in it, 0.036 MiB a block)")
    print(f"{'':47}{'kept':>9} {'peak':>9} {'time':>9}")
    x, y, loss = torch.randn(16, 1, 24, 24), torch.randint(10, (16,)), nn.CrossEntropyLoss()
    kinds = ("stored", "reversible")
    credits: dict[str, Any] = {"Credited, line_search": Codes, "Credited, fa": FeedbackAlignment, "AltMin": None}
    for name, credit in credits.items():
        for depth in depths:
            steps: dict[str, Any] = {}
            figures: dict[str, tuple[str, int]] = {}
            for kind in kinds:
                note(f"rules: {name}, {depth} blocks, {kind}")
                model = classifier(depth, kind)
                if credit is None:
                    rule = AltMin(model, loss, partial(torch.optim.Adam, lr=1e-3))
                    steps[kind] = rule.step
                    rule.step(x, y)
                    with Standing() as during:
                        rule.step(x, y)
                    # A step is one call, so that its peak alone is seen; the weights' gradients live and die inside it.
                    figures[kind] = "-", peak(during.events, [])
                    continue
                model = Credited(model, credit(), loss)

                def forward(model: nn.Module = model) -> Tensor:
                    return loss(model(x), y)

                def step(*_: Tensor, model: nn.Module = model, forward: Any = forward) -> None:
                    model.zero_grad()
                    forward().backward()

                step()
                model.zero_grad()
                kept, highest = kept_and_peak(forward, Tensor.backward, [*model.parameters()])
                steps[kind], figures[kind] = step, (f"{kept / MIB:.2f}", highest)
            seconds = measure(steps, [(x, y)], rounds, time.process_time)
            for kind, (held, highest) in figures.items():
                row = f"{held:>9} {highest / MIB:>9.2f} {ratio(seconds, kind, 'stored'):>9.3f}"
                print(f"  {f'{name}, {depth} blocks, {kind}':45}{row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--depths", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--rule-depths", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--blocks", type=int, default=64, help="depth at which time is measured")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--allocator", default="as it is", help="what the table of times calls it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.allocator != "as it is":
        return times(chosen.blocks, chosen.rounds, chosen.allocator)
    load = os.getloadavg()[0]
    state = "idle" if load < 0.5 else "NOT IDLE, so that times and their ratios are rough"
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {load:.2f} before: {state}")
    parts: dict[str, Callable[[], None]] = {
        "memory": partial(memory, chosen.depths),
        "nets": networks,
        "exact": partial(exact, chosen.depths),
        "rules": partial(rules, chosen.rule_depths, chosen.rounds),
        "time": partial(times, chosen.blocks, chosen.rounds, chosen.allocator),
    }
    for part in chosen.parts:
        parts[part]()
    if "time" in chosen.parts and platform.libc_ver()[0] == "glibc":
        sys.stdout.flush()
        command = [
            sys.executable,
            *(f"-W{option}" for option in sys.warnoptions),
            __file__,
            "--allocator",
            "keeps what is freed",
        ]
        command += ["--blocks", str(chosen.blocks), "--rounds", str(chosen.rounds)]
        subprocess.run(command, check=True, env={**os.environ, **HOLDING})
    print(f"\nload {os.getloadavg()[0]:.2f} after")


if __name__ == "__main__":
    main()
