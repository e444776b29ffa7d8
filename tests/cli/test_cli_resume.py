"""The real thing: a process killed in mid-training, and another that goes on with its run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from beyondprop.cli import main
from beyondprop.lab.comparing import comparison

TRAIN = [
    "--net",
    "mlp:64x2",
    "--rule",
    "am-mem",
    "--rule",
    "am-adam",
    "--seeds",
    "1",
    "--epochs",
    "10",
    *["--threads", "1"],
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the files may be being written."""
    files = sorted((path / "metrics").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_bytes().split(b"\n")[:-1]]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "beyondprop.cli", "compare", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(comparison.__file__).parents[3])},
    )


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(rows_of(path)) < count or not list((path / "checkpoints").glob("*.safetensors")):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "no rows came"
        time.sleep(0.002)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *TRAIN, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    expected = rows_of(tmp_path / "whole")
    path = tmp_path / "killed"
    process = start(*TRAIN, "--out", str(path))
    wait_for_rows(path, 27, process)  # the second rule's training has begun
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    written = rows_of(path)
    assert 27 <= len(written) < len(expected)
    assert not (path / "report.html").exists()
    assert main(["compare", "--resume", str(path), "--quiet"]) == 0
    assert rows_of(path) == expected
    assert (path / "report.html").is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_in_a_process(tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    process = start(*TRAIN, "--epochs", "300", "--out", str(path))
    wait_for_rows(path, 5, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"beyondprop compare --resume {path}" in output
    assert "Traceback" not in output


def code_of_ones_own(folder: Path) -> list[str]:
    """A plugin and a net that leave a mark when they are executed; return the arguments that name them."""
    (folder / "mine.py").write_text("with open('mark', 'a') as f:\n    f.write('plugin ')\n")
    (folder / "net.py").write_text(
        "from torch import nn\nwith open('mark', 'a') as f:\n    f.write('net ')\n"
        "def build(shape, outputs):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))\n"
    )
    return ["--plugin", "mine.py", "--net", "net.py:build"]


def test_resume_executes_no_code_that_the_directory_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from beyondprop.lab import registry, resume

    monkeypatch.chdir(tmp_path)
    code = code_of_ones_own(tmp_path)
    train = ["--rule", "sgd", "--seeds", "1", "--epochs", "1", "--no-alignment", "--out", "r", "--quiet"]
    assert main(["compare", *code, *train]) == 0
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(registry, "_files", {})
    mark = tmp_path / "mark"
    mark.unlink()
    go_on = ["compare", "--resume", "r", "--quiet"]
    for given, missing in (
        (code[:0], "'--plugin=mine.py', '--net=net.py:build'"),
        (code[:2], ": '--net=net.py:build'"),
        (code[2:], ": '--plugin=mine.py'."),
    ):
        assert main([*go_on, *given]) == 2
        said = capsys.readouterr().err
        assert "'r' names Python code, which would be executed" in said
        assert missing in said
        assert "--trust" in said
    with pytest.raises(ValueError, match=r"names Python code.*'--plugin=mine.py', '--net=net.py:build'.*trust=True"):
        resume("r")
    assert main([*go_on, *code, "--net", "other.py:build"]) == 2
    assert "leave out --net" in capsys.readouterr().err
    assert main(["compare", "--trust"]) == 2
    assert main(["report", "r"]) == 0
    assert not mark.exists()
    assert main([*go_on, *code]) == 0
    assert mark.read_text() == "plugin net "
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(registry, "_files", {})
    assert main([*go_on, "--trust"]) == 0
    assert mark.read_text().split().count("plugin") == 2
    (tmp_path / "moved.py").write_text((tmp_path / "mine.py").read_text())
    (tmp_path / "mine.py").write_text("1 / 0\n")
    assert main([*go_on, "--plugin", "moved.py", *code[2:]]) == 0
    resume("r")  # all is loaded in this process


def test_what_to_run_after_ctrl_c_names_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from beyondprop.cli.progress import Lines

    monkeypatch.chdir(tmp_path)
    code = code_of_ones_own(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Lines, "row", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(["compare", *code, "--rule", "sgd", "--seeds", "1", "--epochs", "2", "--out", "r"]) == 130
    command = "beyondprop compare --resume r --plugin=mine.py --net=net.py:build"
    assert command in capsys.readouterr().out
    assert main(command.split()[1:]) == 0
