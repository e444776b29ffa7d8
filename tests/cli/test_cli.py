from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from beyondprop import data
from beyondprop.cli import main
from beyondprop.data import Dataset
from beyondprop.errors import DataUnavailableError
from beyondprop.lab import registry
from beyondprop.lab.comparing import comparison, train

QUICK = ["--net", "mlp:8x2", "--epochs", "2", "--seeds", "1", "--threads", "1"]
PACKAGE = Path(comparison.__file__).parent


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(120, 1, 8, 8, generator=g), torch.arange(120) % 10
    small = Dataset("digits", x[:90], y[:90], x[90:], y[90:], tuple("0123456789"))
    monkeypatch.setattr(data, "load", lambda name, progress=None: small)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    registry.rules.names()  # what is built in is loaded when somebody looks
    before = dict(registry.rules.rows)
    yield
    registry.rules.rows.clear()
    registry.rules.rows.update(before)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in (*registry.rules.names(), *data.names(), "mlp:WIDTH[xDEPTH][:ACTIVATION][:bn]", "halve:N", "60,000"):
        assert word in out


def test_a_narrow_list_keeps_the_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["list"]) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {*registry.rules.names(), *data.names(), "lenet5"} <= set(first)


def test_list_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("BEYONDPROP_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in found["rules"]] == registry.rules.names()
    assert {"summary", "source", "lr", "grid"} <= set(found["rules"][0])
    assert {d["name"]: d["at_hand"] for d in found["data"]} == {
        "diabetes": True,
        "digits": True,
        "nmnist-small": False,
        "higgs": False,
        "mnist": False,
        "fashion-mnist": False,
        "cifar10": False,
    }
    (tmp_path / "mnist" / "file").touch()
    main(["list", "--json"])
    assert json.loads(capsys.readouterr().out)["data"][4]["at_hand"]


def test_compare_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["compare", *QUICK, "--rule", "adam", "--rule", "sgd", "--lr", "adam=0.005", "--lr", "sgd=0.2", "--out", "r"]
    assert main([*argv, "--batch-size", "20", "--schedule", "cosine", "--evaluate-every", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "2 trainings to do, recorded in r" in captured.out
    assert "1/2  adam seed 0  acc." in captured.out
    assert "Backprop, SGD" in captured.out
    assert captured.out.endswith("r/figures/accuracy.png\nr/report.html\n")
    config = (tmp_path / "r" / "config.toml").read_text()
    for line in ('schedule = "cosine"', "batch_size = 20", "evaluate_every = 3", "lr = 0.005", "lr = 0.2"):
        assert line in config
    page = tmp_path / "r" / "report.html"
    page.unlink()
    assert main(["report", "r"]) == 0
    assert page.is_file()
    assert "Backprop, SGD" in capsys.readouterr().out
    assert main(["report", "r", "--json", "--output", "other.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == "other.html"
    assert (tmp_path / "other.html").is_file()


def test_default_directory_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", *QUICK, "--rule", "adam", "--json", "--no-alignment"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "1 training to do" in captured.err
    path = tmp_path / found["path"]
    assert path.parent == tmp_path / "runs"
    assert path.name.endswith("-digits-mlp-8x2")
    files = list((path / "metrics").glob("*.jsonl"))
    assert files
    assert all("alignment" not in file.read_text() for file in files)


def test_quiet_shows_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *QUICK, "--rule", "adam", "--quiet", "--out", "r"]) == 0
    out = capsys.readouterr().out
    assert "training" not in out.splitlines()[0]
    assert "Backprop, Adam" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rule", "amadam"], "rule must be one of 'am-adam', 'am-adam-unit'"),
        (["--rule", "amadam"], "perhaps you meant 'am-adam'"),
        (
            ["--data", "minst"],
            "data must be one of diabetes, digits, nmnist-small, higgs, mnist, fashion-mnist, cifar10, a file such as",
        ),
        (["--data", "minst"], "got 'minst'; perhaps you meant 'mnist'"),
        (["--net", "mpl:3x3"], "net must be one of mlp:WIDTH[xDEPTH]"),
        (["--net", "lenet5"], "lenet5 needs images of 16x16 or more"),
        (["--lr", "adam"], "--lr takes RULE=LR, such as adam=0.001, got 'adam'"),
        (["--lr", "adm=1"], "lr is given for 'adm'"),
        (["--lr", "adam=1", "--lr", "adam=2"], "--lr must name each rule once, got adam=1, adam=2"),
        (["--tune-epochs", "1"], "--tune-epochs is for the trainings of --tune"),
        (["--seeds", "0"], "seeds must be >= 1, got 0"),
        (["--seeds", "9" * 30], "seeds must be at most 10000, got 999"),
        (["--epochs", "1e308"], "epochs must be at most 1e+09, got 1e+308"),
        (["--net", "mlp:4x100000"], "the depth must be at most 2,000, got 100000"),
        (["--batch-size", "1", "--net", "mlp:5x1:bn"], "batch_size must be 2 or more for mlp:5x1:bn, whose BatchNorm"),
        (["--schedule", "linar"], "perhaps you meant 'linear'"),
        (["--out", "full"], "'full' is there already"),
        (["--resume", "full"], "'full' is no run directory"),
        (["--plugin", "gone.py"], "The plugin 'gone.py' cannot be loaded"),
        (["--net", "mlp:8x2:bn:dropout=0.1", "--rule", "am-mem-bcd"], "am-mem-bcd cannot train mlp:8x2:bn:dropout=0.1"),
        (["--epochs", "many"], "many"),
        (["--epoch", "3"], "--epochs"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert main(["compare", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("argv", [[], ["compar"], ["report"], ["report", "nix"]])
def test_other_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_resume_takes_no_other_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *QUICK, "--rule", "adam", "--out", "r"]) == 0
    assert main(["compare", "--resume", "r", "--epochs", "3", "--batch-size", "7"]) == 2
    assert "leave out --epochs, --batch-size" in capsys.readouterr().err
    assert main(["compare", "--resume", "r"]) == 0
    assert "Nothing is left to train" in capsys.readouterr().out


def test_missing_data_is_a_failure_of_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise DataUnavailableError("mnist/train was not found.")

    monkeypatch.setattr(data, "load", load)
    assert main(["compare", *QUICK, "--data", "mnist"]) == 1
    assert capsys.readouterr().err == "beyondprop: mnist/train was not found.\n"


def test_unexpected_errors_are_short_unless_debugged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(train, "fit", fail)
    assert main(["compare", *QUICK, "--out", "r"]) == 1
    assert capsys.readouterr().err == "beyondprop: KeyError: 'lost'\n--debug shows where it comes from.\n"
    with pytest.raises(KeyError, match="lost"):
        main(["compare", *QUICK, "--out", "r2", "--debug"])


def test_failures_are_shown_and_all_failed_is_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    # A learning rate beyond float32 makes the weights infinite at once.
    bad = ["compare", *QUICK, "--rule", "sgd", "--lr", "sgd=1e38", "--schedule", "constant"]
    assert main([*bad, "--out", "r"]) == 1
    captured = capsys.readouterr()
    assert "sgd seed 0 failed:" in captured.out
    assert "not finite" in captured.out
    assert main([*bad, "--rule", "adam", "--out", "r2"]) == 0
    assert "sgd seed 0 failed:" in capsys.readouterr().out


def test_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from beyondprop.cli.progress import Lines

    row = Lines.row

    def interrupt(self: Lines, *args: Any) -> None:
        row(self, *args)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "row", interrupt)
        assert main(["compare", *QUICK, "--rule", "adam", "--no-alignment", "--out", "my runs/r"]) == 130
    assert "beyondprop compare --resume 'my runs/r'" in capsys.readouterr().out
    assert main(["compare", "--resume", "my runs/r"]) == 0


def test_plugin_brings_a_rule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom beyondprop.lab import registry\n"
        "registry.register(dataclasses.replace(registry.rules.get('sgd'), name='mine', title='My own'))\n"
    )
    assert main(["compare", *QUICK, "--plugin", "mine.py", "--rule", "mine", "--out", "r"]) == 0
    assert "My own" in capsys.readouterr().out


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from beyondprop.cli import main\n"
        "for argv in (['--help'], ['compare', '--help'], ['report', '--help'], ['list', '--help'], ['compar']):\n"
        "    main(argv)\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--batch-size" in done.stdout
    assert "(default: digits)" in done.stdout


@pytest.mark.parametrize("module", ["beyondprop", "beyondprop.cli"])
def test_version_by_module(module: str) -> None:
    from beyondprop import __version__

    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"beyondprop {__version__}\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
@pytest.mark.parametrize("argv", ["--help", "list", "list --json", "--version"])
def test_a_reader_that_goes_is_no_traceback(argv: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        line = [sys.executable, "-m", "beyondprop", *argv.split()]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # what is flushed at exit
        done = subprocess.run(line, stdout=gone, stderr=subprocess.PIPE, text=True, check=False, env=env)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("error", [ImportError("numpy failed"), RecursionError("maximum recursion depth exceeded")])
def test_ctrl_c_that_a_package_turned_into_an_error_is_ctrl_c(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from beyondprop.cli.list import List

    def during_an_import(self: List) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(List, "run", during_an_import)
        assert main(["list"]) == 130
    assert capsys.readouterr().err == ""
    assert signal.set_wakeup_fd(-1) == -1
    monkeypatch.setattr(List, "run", lambda self: (_ for _ in ()).throw(error))
    assert main(["list"]) == 1
    assert str(error) in capsys.readouterr().err
