"""What others wrote reaches the terminal without escape sequences and control characters, wherever it is printed."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_runs import config, curves, write_run
from rich.table import Table
from rich.text import Text

from beyondprop.cli import main
from beyondprop.cli.progress import Bars, Lines
from beyondprop.cli.terminal import Terminal, escaped
from beyondprop.lab.comparing.member import Contender, Member
from beyondprop.lab.registry import rules
from beyondprop.lab.runs.text import clean, cleaned, clipped

EVIL = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\x9d0;x\x9cb\x00\r\u202ec\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\x7fd\x1b"
SHOWN = "aredbclinkd"
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, SHOWN),
        ("plain é 日本 🙂\ttab\nline", "plain é 日本 🙂\ttab\nline"),
        ("lone \udc80\ud83d", r"lone \udc80\ud83d"),
        ("an unended \x1b]0;title stays text", "an unended 0;title stays text"),
        ("\x1b(B\x1bMx\x1b[?25l\x1b[1;2Hy", "xy"),
    ],
)
def test_text_is_cleaned(text: str, shown: str) -> None:
    assert clean(text) == shown
    assert clean(shown) == shown
    assert cleaned({text: [text, 1, None, {"a": text}]}) == {shown: [shown, 1, None, {"a": shown}]}


def test_long_text_keeps_both_ends() -> None:
    assert clipped("x" * 50, 50) == "x" * 50
    found = clipped("begin" + "x" * 10_000 + "end", 60)
    assert len(found) == 60
    assert found.startswith("beginx")
    assert found.endswith("xend")


@pytest.mark.parametrize("color", [False, True])
def test_a_table_is_laid_out_by_the_clean_text(color: bool) -> None:
    def shown(cell: str) -> str:
        table = Table(title=Text(cell))
        table.add_column(Text(cell))
        table.add_row(Text(cell, style="bold"), cell)
        out = io.StringIO()
        console = Terminal(file=out, width=60, force_terminal=color, color_system="standard" if color else None)
        console.print(table)
        console.print(Text(cell))
        console.print(cell)
        return re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())

    assert not COMMANDS.search(shown(EVIL))
    assert shown(EVIL).count(SHOWN) == 6
    assert len({len(line) for line in shown(EVIL).splitlines() if line[0] in "│┃┡└┏"}) == 1  # the frame is whole


def test_json_has_controls_as_escapes() -> None:
    text = json.dumps({"a": EVIL + "\udc80é"}, ensure_ascii=False)
    assert not COMMANDS.search(escaped(text))
    assert json.loads(escaped(text)) == {"a": EVIL + "\udc80é"}
    assert "é" in escaped(text)


def test_a_run_directory_commands_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles = {"adam": EVIL, "sgd": "\x1b[2J"}
    rows = curves(titles)
    rows += [{"kind": "warning", "contender": "adam", "seed": 0, "message": EVIL}]
    rows += [{"kind": "failed", "contender": "sgd", "seed": 0, "message": EVIL}]
    path = write_run(tmp_path / "r\x1b[31m", config(titles) | {"name": EVIL, "nets": [EVIL]}, rows)
    for argv in (["report", str(path)], ["report", str(path), "--json"]):
        assert main(argv) == 0
        out, err = capsys.readouterr()
        assert SHOWN in out
        assert not COMMANDS.search(out + err)
    page = (path / "report.html").read_text(encoding="utf-8")
    assert not COMMANDS.search(page)
    assert SHOWN in page
    (path / "env.json").write_text("[]")
    assert main(["report", str(path)]) == 2
    assert not COMMANDS.search(capsys.readouterr().err)


@pytest.mark.filterwarnings("default")
def test_messages_of_errors_and_warnings_command_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rules.names()  # what is built in is loaded when somebody looks
    before = dict(rules.rows)
    (tmp_path / "mine.py").write_text(
        "import dataclasses, warnings\nfrom beyondprop.lab import registry\n"
        "sgd = registry.rules.get('sgd')\n"
        f"evil = {EVIL!r} + '\\udc80'\n"
        "def build(model, loss, lr):\n    warnings.warn(evil)\n    return sgd.build(model, loss, lr)\n"
        "def bad(model, loss, lr):\n    raise RuntimeError(evil * 1000)\n"
        "registry.register(dataclasses.replace(sgd, name='mine', title=evil, summary=evil, build=build))\n"
        "registry.register(dataclasses.replace(sgd, name='bad', title=evil, build=bad))\n"
    )
    quick = ["--net", "mlp:6x1", "--epochs", "1", "--seeds", "1", "--plugin", "mine.py", "--batch-size", "500"]
    try:
        assert main(["compare", *quick, "--rule", "mine", "--out", "r"]) == 0
        out, err = capsys.readouterr()
        assert "Warning: " + SHOWN + r"\udc80" in out
        assert not COMMANDS.search(out + err)
        for argv in (["list"], ["list", "--json"]):
            assert main(argv) == 0
            assert not COMMANDS.search(capsys.readouterr().out)
        assert main(["compare", *quick, "--rule", "bad", "--out", "q"]) == 1
        out, err = capsys.readouterr()
        assert not COMMANDS.search(out + err)
        assert SHOWN in err
        assert len(err) < 2000
    finally:
        rules.rows.clear()
        rules.rows.update(before)


def test_every_training_that_goes_on_has_a_bar() -> None:
    out = io.StringIO()
    rules.names()
    members = [Member(Contender("mlp:5x1", rules.get("sgd")), seed, 0.1, 2.0) for seed in (0, 1)]
    bars = Bars(Terminal(file=out, width=100, force_terminal=True))
    bars.start(Path("r"), members)
    for member, share in zip(members, (1, 3), strict=True):
        bars.begin(member)
        bars.row(member, {"kind": "eval", "accuracy": share / 4, "seconds": 0.1})
        bars.progress(member, share, 4)
    tasks = {task.description.strip(): task for task in bars._bars.tasks}
    assert {name: task.completed for name, task in tasks.items()} == {
        "all": 2.0,
        "sgd seed 0": 0.25,
        "sgd seed 1": 0.75,
    }
    bars.begin(members[1])  # again, after its worker was killed
    bars.end(members[0])
    assert {task.description.strip(): task.completed for task in bars._bars.tasks} == {"all": 3.5, "sgd seed 1": 0.0}
    bars.progress(members[1], 2, 4)
    bars.end(members[1])
    bars.stop()
    assert [task.completed for task in bars._bars.tasks] == [4.0]
    assert "1/2  sgd seed 0  acc.  25.00%" in out.getvalue()


def test_names_are_no_markup_for_the_bars() -> None:
    out = io.StringIO()
    rules.names()  # loads them
    member = Member(Contender("mine[/b]" + "x" * 500 + EVIL, rules.get("sgd"), several=True), 0, 0.1, 1.0)
    for observer in (Bars(Terminal(file=out, width=100, force_terminal=True)), Lines(Terminal(file=out, width=100))):
        observer.start(Path("r"), [member])
        observer.begin(member)
        observer.row(member, {"kind": "eval", "accuracy": 0.5, "loss": 1.0, "seconds": 0.1})
        observer.progress(member, 1, 2)
        observer.end(member)
        observer.stop()
    assert "mine[/b]xxx" in out.getvalue()
    assert "\x1b]" not in out.getvalue()
    assert "x" * 100 not in out.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["list", "--json"]])
def test_a_full_disk_behind_the_output_is_told(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "beyondprop", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("beyondprop: The standard output cannot be written: ")
    assert "Traceback" not in done.stderr
