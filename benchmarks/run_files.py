"""What run directories and recorded results do when a file in them is damaged: seeded mutations of all that is read back.

    python benchmarks/run_files.py [--count 1000] [--seed 0] [--only tuned old] [--show 5]

Small directories are made once: tuned, with a warm start, stopped in mid-training, with a training that failed, as older
versions wrote them (without checksums), and recorded results of recipes. Mutation i copies one of them and damages one file:
bits, cuts, lines, values of other types and sizes, escape sequences, lone surrogates, files that are emptied, deleted, renamed
or exchanged. Then `report` and `compare --resume` run in it, or `ledger` and `reproduce`. Mutation i goes by `(seed, i)`;
`--at i` runs one alone. Prints a line a directory:

- refused: an error of ours with the file's name and what to do; same: success, with the numbers of the undamaged directory;
- said: success with other numbers, and a word on the file, on what has no checksum or did not reach its end;
- foreign: another error, without the file's name, without a remedy, or above 2,000 characters;
- hangs: longer than `--limit` seconds; changed: success with other numbers and no word.

Exits with 1 where one of the last three is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mutations import Hang, bounded, damaged
from safetensors import safe_open
from safetensors.torch import save_file

from beyondprop.cli import main as beyondprop
from beyondprop.lab import recipes
from beyondprop.lab.comparing import comparison
from beyondprop.lab.comparing.member import Member, Observer
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.recipes import theorem_3_2
from beyondprop.lab.recipes._base import Context, Row
from beyondprop.lab.recipes._kept import Kept
from beyondprop.lab.report import _html, read_run, to_json
from beyondprop.lab.runs.text import clean

KINDS = ("refused", "same", "said", "foreign", "hangs", "changed")
REMEDY = re.compile(
    r"[Dd]elete|[Pp]ut |[Rr]emove|must |needs? |needed|[Cc]hoose|[Gg]ive|begin|[Ll]eave out|at most|is none of|will do|take"
)
VALUES = (
    "-1", "0", "1", "-0.5", "3.5", "1e999", "NaN", "nan", "inf", "1e308", "9" * 30, "9" * 5000, "true", "false", "null", '""',
    '"\\ud800"', '"\\u001b[31mred\\u0007"', '"' + "x" * 10_000 + '"', "[]", "{}", "[1]", '{"a": 1}', "[" * 3000, '"\u202eabc"',
)  # fmt: skip
VALUE = re.compile(r'(?<=[=:\[,] )("(?:[^"\\\n]|\\.)*"|-?[0-9][0-9.e+-]*|true|false|null)|(?<=\[)("[^"\n]*"|-?[0-9.]+)')
COMMON = ["--net", "mlp:6x1", "--batch-size", "500", "--no-alignment", "--quiet"]


@dataclass(frozen=True)
class Directory:
    """What is damaged: a directory, the commands that read it, and what they find in it undamaged."""

    path: Path
    commands: tuple[tuple[str, ...], ...]
    look: Callable[[Path, str], Any]
    good: tuple[Any, ...] = ()


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out


def command(argv: tuple[str, ...], path: Path) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it said, the page included."""
    with captured() as out:
        code = beyondprop([part.replace("DIR", str(path)) for part in argv])
    pages = [] if code else [page for page in (path / "report.html", path / "ledger.md") if page.is_file()]
    return code, "\n".join([out.getvalue(), *(page.read_text(encoding="utf-8") for page in pages)])


def look_at_run(path: Path, said: str) -> Any:
    """Return what a run directory says of metrics, rates, settings and rows; times are left out."""
    run = read_run(path)
    left_out = (
        ("seconds", "message") if any("Traceback" in row.get("message", "") for row in run.rows) else ("seconds",)
    )
    rows = [{key: value for key, value in row.items() if key not in left_out} for row in run.rows]
    found = to_json(run)
    for one in (*found["contenders"], *found["warm_starts"]):
        one.pop("seconds")
    env = {key: value for key, value in run.env.items() if key not in ("resumed", "started")}
    kept = {
        key: found[key] for key in ("config", "metrics", "split", "contenders", "warm_starts", "failures", "warnings")
    }
    return json.loads(json.dumps([sorted(map(json.dumps, rows)), kept, env], default=str))


def look_at_text(path: Path, said: str) -> Any:
    """Return what a command wrote."""
    return said.replace(str(path), "DIR")


class StopAt(Observer):
    """Interrupts at a row, as Ctrl-C does."""

    def __init__(self, count: int) -> None:
        self.count = count

    def row(self, member: Member, row: dict[str, Any]) -> None:
        self.count -= 1
        if self.count == 0:
            import signal

            signal.raise_signal(signal.SIGINT)


def directories(folder: Path) -> dict[str, Directory]:
    """Make the directories, undamaged."""
    rules = ("--rule", "adam", "--rule", "sgd")
    made = {
        "tuned": [*rules, "--seeds", "2", "--epochs", "2", "--tune"],
        "warm": ["--rule", "adam", "--rule", "am-adam", "--seeds", "1", "--epochs", "3", "--warm-start", "sgd:1"],
        "failed": [*rules, "--seeds", "1", "--epochs", "2", "--lr", "sgd=1e37"],
    }
    for name, argv in made.items():
        code, said = command(("compare", *COMMON, *argv, "--out", str(folder / name)), folder)
        assert code == 0, said
    settings = Settings(
        nets=("mlp:6x1",), rules=("adam", "sgd"), seeds=(0, 1), epochs=3, batch_size=500, alignment=False
    )
    with contextlib.suppress(KeyboardInterrupt):
        comparison.compare(settings, out=folder / "stopped", observer=StopAt(8))
    shutil.copytree(folder / "stopped", folder / "old")
    (folder / "old" / "checksums.txt").unlink()
    for file in (folder / "old" / "checkpoints").iterdir():
        with safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key).clone() for key in content.keys()}  # noqa: SIM118
            notes = {key: content.metadata()[key] for key in ("format", "tree")}
        save_file(tensors, file, notes)
    read = (("report", "DIR"), ("compare", "--resume", "DIR", "--quiet"))
    found = {name: Directory(folder / name, read, look_at_run) for name in (*made, "stopped", "old")}

    results = folder / "results"
    results.mkdir()
    here = Path(__file__).parents[1] / "reproduction"
    for name in ("theorem-3-2", "adding-problem", "streams"):
        shutil.copy(here / f"{name}.json", results)
    write = (("ledger", "--recorded", "DIR", "--output", "DIR/ledger.md"),)
    found["results"] = Directory(results, write, look_at_text)

    def measure(context: Context) -> tuple[list[Row], dict[str, Any]]:
        kept = Kept(context.out / "kept.json", {"seed": 0})
        if not context.quick:
            raise KeyboardInterrupt
        values = [kept.get(f"{k}", lambda k=k: [0.5 * k, 1.0]) for k in range(3)]
        return [Row(f"row {k}", tuple(value), "%") for k, value in enumerate(values)], {}

    theorem_3_2.RECIPE = replace(recipes.get("theorem-3-2"), measure=measure)
    again = (("reproduce", "theorem-3-2", "--quick", "--quiet", "--out", "DIR"),)
    code, said = command(again[0], folder / "done")
    assert code == 0, said
    shutil.copytree(folder / "done", folder / "begun")
    (folder / "begun" / "theorem-3-2-quick" / "result.json").unlink()
    for name in ("done", "begun"):
        found[name] = Directory(folder / name, again, look_at_text)
    with tempfile.TemporaryDirectory() as where:
        for name, directory in found.items():
            copy = Path(where) / name
            shutil.copytree(directory.path, copy)
            looks = []
            for argv in directory.commands:
                code, said = command(argv, copy)
                assert code == 0, said
                looks.append(directory.look(copy, said))
            found[name] = replace(directory, good=tuple(looks))
    return found


def files_of(path: Path, rng: random.Random) -> Path:
    """Return a file that is read back; one of each folder is as likely as the others."""
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.suffix not in (".html", ".png", ".md")]
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(file.parent.name if file.parent.name in ("metrics", "checkpoints") else file.name, []).append(
            file
        )
    return rng.choice(groups[rng.choice(sorted(groups))])


def damage(file: Path, rng: random.Random) -> tuple[str, list[str]]:
    """Damage a file; return in what way, and the names that a message may have."""
    how = rng.choice(("bytes", "bytes", "value", "value", "value", "lines", "file", "text"))
    names = [file.name]
    content = file.read_bytes()
    text = content.decode("utf-8", "surrogateescape")
    if how == "bytes" or (file.suffix == ".safetensors" and how != "file"):
        file.write_bytes(damaged(content, rng))
    elif how == "value" and (places := [*VALUE.finditer(text)]):
        start, end = rng.choice(places).span()
        text = text[:start] + rng.choice(VALUES) + text[end:]
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    elif how == "text":
        at = rng.randrange(len(text) + 1)
        piece = rng.choice((
            "\x1b[2J",
            "\x1b]0;x\x07",
            "\u202e",
            "é",
            "\\ud83d",
            "\x00",
            "\ufeff",
            "\U0001f600" * 50,
            "#",
            "'",
        ))
        file.write_text(text[:at] + piece + text[at:], encoding="utf-8", errors="surrogateescape", newline="")
    elif how == "file":
        others = [f for f in file.parent.iterdir() if f.is_file() and f != file and f.suffix == file.suffix]
        other = rng.choice(others) if others else file.with_name(f"x{file.suffix}")
        names += [other.name, file.stem, other.stem]
        what = rng.choice(("deleted", "renamed", "exchanged", "copied over", "empty"))
        how += f", {what} ({other.name})"
        if what == "deleted":
            file.unlink()
            names += [f"`{file.stem}`,", f", `{file.stem}`"]  # in the ledger's list of what is not recorded
        elif what == "renamed":
            other = file.with_name(f"{rng.choice(('x', 'x.seed7', file.stem + '~'))}{file.suffix}")
            file.rename(other)
            names += [other.name, other.stem]
        elif what == "exchanged" and others:
            mine, theirs = content, other.read_bytes()
            file.write_bytes(theirs)
            other.write_bytes(mine)
        elif what == "copied over":
            other.write_bytes(content)
        else:
            file.write_bytes(b"")
    else:
        lines = content.split(b"\n")
        line = lines[(at := rng.randrange(len(lines)))]
        to = rng.randrange(len(lines))
        what = rng.choice(("deleted", "doubled", "exchanged", "moved to the end"))
        how += f", {what}"
        if what == "exchanged":
            lines[at], lines[to] = lines[to], lines[at]
        else:
            lines[at : at + 1] = [line] * 2 if what == "doubled" else []
            lines += [line] if what == "moved to the end" else []
        file.write_bytes(b"\n".join(lines))
    return how, names


def judged(code: int, said: str, look: Callable[[], Any], good: Any, names: list[str]) -> tuple[str, str]:
    """Return the kind of an outcome, and what it was in words."""
    if "beyondprop: " in said and code:
        text = said[said.rindex("beyondprop: ") :]
        is_named = any(name in text for name in names) and REMEDY.search(text)
        is_own = is_named and "--debug shows" not in text and len(text) < 2000 and clean(text) == text
        return ("refused" if is_own else "foreign"), text
    if code:
        return "foreign", f"exit {code}: {said[-500:]}"
    try:
        found = look()
    except ValueError as error:  # what a resume left
        return "foreign", f"unreadable afterwards: {error}"
    if found == good:
        return "same", ""
    words = ("no checksum", "did not reach", "is missing", "half-written", *names)
    text = re.sub(r"DIR\S*|/\S*", "", said.partition("<table")[0])
    return ("said" if any(word in text for word in words) else "changed"), differing(found, good)


def differing(a: Any, b: Any) -> str:
    """Return where two looks differ first."""
    a, b = (json.dumps(x, indent=1, sort_keys=True, default=str).splitlines() for x in (a, b))
    return next(
        (f"{x.strip()} for {y.strip()}" for x, y in zip(a, b, strict=False) if x != y), f"{len(a)} for {len(b)} lines"
    )


def one(directory: Directory, copy: Path, rng: random.Random, limit: float, draw: bool) -> tuple[str, str]:
    """Damage a copy once; return the worst outcome of the commands, and what it was in words."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory.path, copy)
    file = files_of(copy, rng)
    how, names = damage(file, rng)
    worst, told = "same", ""
    drawn = _html.draw
    if not draw:
        _html.draw = lambda *_: []  # type: ignore[assignment]
    try:
        for argv, good in zip(directory.commands, directory.good, strict=True):
            try:
                with bounded(limit), warnings.catch_warnings():
                    code, said = command(argv, copy)
                    outcome, text = judged(code, said, lambda said=said: directory.look(copy, said), good, names)
            except Hang:
                outcome, text = "hangs", f"more than {limit} s"
            except BaseException as error:
                outcome, text = "foreign", f"{type(error).__name__}: {error}"
            if ORDER.index(outcome) > ORDER.index(worst):
                worst, told = outcome, f"{argv[0]}, {file.relative_to(copy)}, {how}: {text}"
    finally:
        _html.draw = drawn
    return worst, told


ORDER = ("same", "refused", "said", "changed", "foreign", "hangs")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="mutations in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="directories whose names begin so")
    parser.add_argument("--show", type=int, default=5, help="faults shown of a directory and a kind")
    parser.add_argument("--at", type=int, help="run this mutation alone, and say what came of it")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one command")
    parser.add_argument("--draw", type=int, default=25, help="one of so many reports has its figures drawn")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = directories(Path(folder))
        copy = Path(folder) / "copy"
        counts: dict[str, dict[str, int]] = {name: dict.fromkeys(KINDS, 0) for name in made}
        shown: dict[str, list[str]] = {name: [] for name in made}
        for index in range(arguments.count) if arguments.at is None else [arguments.at]:
            rng = random.Random(f"{arguments.seed} {index}")
            name = rng.choice(sorted(made))
            if not name.startswith(tuple(arguments.only)):
                continue
            outcome, text = one(made[name], copy, rng, arguments.limit, index % arguments.draw == 0)
            counts[name][outcome] += 1
            if (outcome not in KINDS[:3] and counts[name][outcome] <= arguments.show) or arguments.at is not None:
                shown[name].append(f"    {outcome}, mutation {index}: {text[:600]!r}")
                print(shown[name][-1], file=sys.stderr, flush=True)
    print(
        f"seed {arguments.seed}, {arguments.count} mutations\n{'directory':12}"
        + "".join(f"{kind:>9}" for kind in KINDS)
    )
    for name, row in counts.items():
        print(f"{name:12}" + "".join(f"{count:>9}" for count in row.values()), *shown[name], sep="\n")
    total = {kind: sum(row[kind] for row in counts.values()) for kind in KINDS}
    print(f"{'all':12}" + "".join(f"{count:>9}" for count in total.values()))
    sys.exit(any(total[kind] for kind in KINDS[3:]))


if __name__ == "__main__":
    main()
