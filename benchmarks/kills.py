"""Kill the program at every call that changes a file, before, inside and after it, and run the same command again.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --out benchmarks/results/kills.txt
    OMP_NUM_THREADS=1 python benchmarks/kills.py --only compare --at 17 --when inside --show

The calls are counted in an undisturbed run. Then a process is forked for each and dies there by `os._exit`, so that what is
buffered is lost: before the call; inside, where a write leaves half its bytes, and any other call is done but never
returns; after it. In the column `fails` the disk is full from there on, or a call that needs no room fails once: the command
must end by one sentence with a path. `at random` is a SIGKILL at random times.

The same command again, or the --resume that it names, must end well and leave the files of an undisturbed run, equal
but for times, and nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from disturbed import KILLED, WHEN, Calls, Command, at_random, case, counted, forked


def beyondprop(*argv: str | Path) -> int:
    from beyondprop.cli import main

    return main([str(word) for word in argv])


def comparison(*more: str) -> Command:
    """`compare --out DIR`, and once more, or `--resume DIR` where that is what it says."""
    settings = ("--net", "mlp:4x1", "--rule", "sgd", "--rule", "adam", "--batch-size", "300", *more, "--quiet")

    def run(folder: Path) -> int:
        return beyondprop("compare", *settings, "--out", folder / "in" / "run")

    def again(folder: Path) -> int:
        stderr, sys.stderr = sys.stderr, io.StringIO()
        try:
            code = run(folder)
        finally:
            said, sys.stderr = sys.stderr.getvalue(), stderr
        if code == 2 and "go on with it by --resume" in said:
            return beyondprop("compare", "--resume", folder / "in" / "run", "--quiet")
        sys.stderr.write(said)
        return code

    return Command(run, again)


def killed_before(command: Command, at: int) -> Command:
    """What goes on after `command` was killed: killed, too."""

    def before(folder: Path) -> None:
        def do() -> int:
            Calls(folder, at, "inside").install()
            return command.run(folder)

        if forked(do, folder.with_name("before")) != KILLED:
            raise RuntimeError("the first run was not killed")

    assert command.again is not None
    return Command(command.again, before=before)


def old_run() -> Command:
    """`compare --resume` of a directory as older versions wrote it."""
    row = {"contender": "sgd", "seed": 0, "step": 0, "epoch": 0.0, "accuracy": 0.5}

    def before(folder: Path) -> None:
        kinds = [{"kind": "eval", **row}, {"kind": "finished", **row}]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(k | {"seed": s}) + "\n" for s in (0, 1) for k in kinds)
        )
        (folder / "env.json").write_text("{}")
        lines = (
            'data = "digits"',
            'nets = ["mlp:4x1"]',
            "epochs = 1.0",
            "seeds = [0, 1]",
            "[[contenders]]",
            'name = "sgd"',
        )
        (folder / "config.toml").write_text("\n".join((*lines, 'rule = "sgd"\n')))

    return Command(lambda folder: beyondprop("compare", "--resume", folder, "--quiet"), before=before)


def recipe() -> Command:
    """`reproduce`, of a recipe that has all that recipes write."""
    import torch

    from beyondprop.data import load
    from beyondprop.lab import recipes
    from beyondprop.lab.comparing.settings import Settings
    from beyondprop.lab.nets import build
    from beyondprop.lab.recipes._base import Context
    from beyondprop.lab.recipes._compared import compared, figure
    from beyondprop.lab.recipes._drawing import panels
    from beyondprop.lab.recipes._kept import Kept, trained
    from beyondprop.lab.registry import rules

    def measure(context: Context) -> tuple[list[recipes.Row], dict[str, Any]]:
        numbers = Kept(context.out / "numbers.json")
        one = [numbers.get(key, partial(float, key)) for key in "123"]
        settings = Settings(nets=("mlp:4x1",), rules=("sgd",), seeds=(0,), epochs=1, batch_size=300, alignment=False)
        run = compared(context, "compared", settings)
        digits = load("digits")

        def make() -> Any:
            return rules.get("sgd").build(build("mlp:4x1", (64,), 10), torch.nn.CrossEntropyLoss(), 0.1)

        rows = trained(context, "own", make, digits, seed=0, epochs=2, batch_size=300)
        figure([run], context.out / "compared.png")
        with panels(context, size=(2.0, 2.0)) as axes:
            axes[0, 0].plot(one)
        return [recipes.Row("accuracy", (rows[-1]["accuracy"],))], {}

    small = recipes.Recipe("small", "nowhere", "Nothing.", measure, minutes=1)
    recipes.names, recipes.get = lambda: ["small"], lambda _: small

    def run(folder: Path) -> int:
        return beyondprop("reproduce", "small", "--out", folder / "out", "--record", folder / "record", "--quiet")

    return Command(run)


def report(finished: Path, *output: str) -> Command:
    """`report`, beside the run or elsewhere."""

    def run(folder: Path) -> int:
        return beyondprop("report", folder / "run", *(["--output", folder / output[0]] if output else []))

    return Command(run, before=lambda folder: shutil.copytree(finished, folder / "run") and None)


def download(served: Path) -> Command:
    """`data.load`, of a set that is not at hand, from a server on this machine."""
    import gzip
    import hashlib
    import http.server
    import struct
    from dataclasses import replace

    from beyondprop.data import _catalog, load
    from beyondprop.errors import DataUnavailableError

    stems = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    hashes = []
    for stem, shape in zip(stems, ((6, 28, 28), (6,), (3, 28, 28), (3,)), strict=True):
        head = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        size = 784 ** (len(shape) > 1) * shape[0]
        packed = gzip.compress(head + bytes(k % 10 for k in range(size)), 0)
        (served / f"{stem}-ubyte.gz").write_bytes(packed)
        hashes.append(hashlib.sha256(packed).hexdigest())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    os.environ["no_proxy"] = "*"
    if (child := os.fork()) == 0:
        server.serve_forever()
    server.server_close()
    SERVERS.append(child)
    info, family = _catalog._CATALOG["mnist"]
    assert isinstance(family, _catalog._MnistFamily)
    mirrors = (f"http://127.0.0.1:{server.server_address[1]}/",)
    _catalog._CATALOG["mnist"] = info, replace(family, sha256=tuple(hashes), mirrors=mirrors)  # type: ignore[arg-type]

    def run(folder: Path) -> int:
        os.environ.pop("BEYONDPROP_DATA", None)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        try:
            return len(load("mnist").x_train) - 6
        except (OSError, DataUnavailableError) as error:  # as the command line tells it
            sys.stderr.write(f"beyondprop: {error}\n")
            return 1

    return Command(run)


SERVERS: list[int] = []


def commands(folder: Path) -> dict[str, Callable[[], Command]]:
    """Return what is killed, by name; each is made when its turn comes."""
    compared = partial(
        comparison,
        "--seeds",
        "2",
        "--epochs",
        "1",
        "--no-alignment",
        "--tune",
        "--tune-epochs",
        "0.2",
        "--lr",
        "adam=0.01",
    )

    def finished() -> Path:
        path = folder / "finished"
        if not path.is_dir():
            forked(lambda: beyondprop("compare", "--net=mlp:4x1", "--rule=sgd", "--epochs=1", "--quiet", "--out", path),
                   folder / "said")  # fmt: skip
        return path

    def going_on() -> Command:
        command = compared()
        counted(command, made(folder / "for-resume"), folder / "notes")
        rows = [k for k, call in enumerate(command.calls, 1) if call.startswith("write in/run/metrics/sgd.seed1")]
        return killed_before(command, rows[1])

    return {
        "compare": compared,
        "compare --resume": going_on,
        "compare --warm-start": partial(
            comparison, "--seeds", "1", "--epochs", "1", "--no-alignment", "--warm-start", "sgd:0.5"
        ),
        "compare --resume (old run)": old_run,
        "reproduce": recipe,
        "report": lambda: report(finished()),
        "report --output": lambda: report(finished(), "there/page.html"),
        "a download": lambda: download(made(folder / "served")),
    }


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def warm_up(draw: bool = False) -> None:
    """Import and load once, for all processes to come; no gradient is computed, which autograd wants no fork after.

    Args:
        draw: figures are drawn; else all are one that is drawn here, as that takes most of a short run's time.
    """
    import sklearn.datasets
    import torch
    from matplotlib.figure import Figure

    from beyondprop.cli import entry, progress
    from beyondprop.lab import theory
    from beyondprop.lab.comparing import comparison
    from beyondprop.lab.recipes import _compared
    from beyondprop.lab.report import _html
    from beyondprop.lab.report._figures import Drawing
    from beyondprop.lab.runs import environment
    from beyondprop.lab.training import loop

    del entry, progress, theory, comparison
    torch.set_num_threads(1)
    torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)  # imports torch._dynamo
    sklearn.datasets.load_digits()
    drawn: dict[str, bytes] = {}
    for form in ("png", "svg"):
        figure, stream = Figure(), io.BytesIO()
        figure.subplots().set_title("a figure")
        figure.savefig(stream, format=form)
        drawn[form] = stream.getvalue()

    def savefig(self: Any, where: Any, *, format: str = "png", **_: Any) -> None:
        if hasattr(where, "write"):
            where.write(drawn[format])
        else:
            with open(where, "w+b") as stream:
                stream.write(drawn[format])

    def drawings(shown: Any, formats: Any, *_: Any, **__: Any) -> list[Any]:
        return [Drawing(name, name, name, {form: drawn[form] for form in formats}) for name in ("accuracy", "loss")]

    environment._commit = lambda: "0"  # git takes long to say it, and it may change meanwhile
    loop.work_per_step = lambda *_, **__: 1.0  # it takes longer than these trainings
    if not draw:
        Figure.savefig = savefig  # type: ignore[method-assign]
        _html.draw = _compared.draw = drawings


CURRENT: list[Command] = []


def _case(numbered: tuple[int, str]) -> tuple[str, int, str]:
    at, when = numbered
    wrong = at_random(CURRENT[0], at, CURRENT[0].seconds) if when == "at random" else case(CURRENT[0], at, when)
    return when, at, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="these commands")
    parser.add_argument("--at", type=int, help="this call alone")
    parser.add_argument("--every", type=int, default=1, help="each of so many calls alone")
    parser.add_argument("--when", nargs="*", default=[*WHEN, "at random"])
    parser.add_argument("--seeds", type=int, default=20, help="of the kills at random times")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--show", action="store_true", help="what is said")
    parser.add_argument("--list", action="store_true", help="the calls")
    parser.add_argument("--draw", action="store_true", help="every figure, instead of one for all")
    parser.add_argument("--out", type=Path, help="where the table is written, too")
    arguments = parser.parse_args()
    warm_up(arguments.draw)
    lines = [f"{'command':28}{'calls':>6}" + "".join(f"{when:>12}" for when in (*WHEN, "at random"))]
    print(lines[0])
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        for name, make in commands(Path(temporary)).items():
            if arguments.only is not None and name not in arguments.only:
                continue
            command = make()
            folder = made(Path(temporary, name.replace(" ", "-"), "here"))
            began = time.perf_counter()
            counted(command, folder, folder.with_name("notes"))
            command.seconds = time.perf_counter() - began
            if arguments.list:
                print(*(f"{k:4} {call}" for k, call in enumerate(command.calls, 1)), sep="\n")
            if arguments.at is not None:
                for when in arguments.when:
                    print(when, case(command, arguments.at, when, arguments.show) or "well")
                continue
            cases = [
                (at, w) for w in WHEN if w in arguments.when for at in range(1, len(command.calls) + 1, arguments.every)
            ]
            cases += [(s, "at random") for s in range(arguments.seeds) if "at random" in arguments.when]
            good: Counter[str] = Counter()
            CURRENT[:] = [command]
            faults = []
            with multiprocessing.get_context("fork").Pool(arguments.workers) as pool:
                for when, at, fault in pool.imap_unordered(_case, cases):
                    good[when] += not fault
                    faults += [f"    {when} {at}, {command.calls[at - 1] if when in WHEN else ''}: {fault}"] * bool(
                        fault
                    )
            asked = Counter(when for _, when in cases)
            row = f"{name:28}{len(command.calls):>6}" + "".join(
                f"{f'{good[when]} of {asked[when]}':>12}" for when in (*WHEN, "at random")
            )
            print(row, *faults[:20], f"    {time.perf_counter() - began:.0f} s", sep="\n", flush=True)
            lines.append(row)
            wrong += len(faults)
    for server in SERVERS:
        os.kill(server, signal.SIGTERM)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
