"""`beyondprop compare`: trainings side by side, recorded and reported."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from beyondprop.cli.report import show
from beyondprop.cli.usage import Debug, Flag, Folder, Json, Workers, usage, warnings_to
from beyondprop.lab.comparing.settings import Settings, untrusted

if TYPE_CHECKING:
    from beyondprop.cli.progress import Lines


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Of contenders, nets x rules, on a task."""

    def __post_init__(self) -> None:
        """Take them as they are: `settings` checks them, and says what is wrong in one line."""

    def settings(self) -> Settings:
        """Return the settings, or raise `ValueError`."""
        if self.tune_epochs is not None and not self.tune:
            raise ValueError("--tune-epochs is for the trainings of --tune; give both, or neither.")
        return Settings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train networks by several rules on the same batches, and report how they do."""

    options: OmitArgPrefixes[Options] = dataclasses.field(default_factory=Options)
    out: Folder = None
    """Run directory, new or empty. Default: one in runs/, named by time, task and net."""
    resume: Folder = None
    """Go on with a run that was stopped, with the settings recorded there; plugins and nets of files are given again."""
    trust: Flag = False
    """Execute the Python files that the directory of --resume names; a received one may name anything."""
    workers: Workers = None
    """Train in N processes at once, each with --threads, or by `ray` on the Ray cluster that runs; equal but for seconds."""
    json: Json = False
    quiet: Flag = False
    """No progress."""
    debug: Debug = False

    def run(self) -> int:
        """Do it; return the exit code."""
        with usage():
            if self.trust and self.resume is None:
                raise ValueError("--trust is for the code that the directory of --resume names; give both, or neither.")
            settings = self.options.settings() if self.resume is None else self._recorded(self.resume)
        from beyondprop.cli.progress import Bars, Lines
        from beyondprop.cli.terminal import Terminal

        console = Terminal(stderr=self.json)
        live = console.is_terminal and not self.quiet
        observer = Bars(console) if live else Lines(console, quiet=self.quiet)
        with warnings_to(lambda text: observer.note(text)):
            path: Path | None = None
            try:
                try:
                    path = self._train(settings, observer)
                finally:
                    observer.stop()
                return show([path], None, as_json=self.json, console=console)
            except KeyboardInterrupt:
                if path is not None:
                    command = shlex.join(["beyondprop", "report", str(path)])
                    observer.command("Stopped; all is trained, the report is missing. Make it by:", command)
                elif observer.path is not None:
                    workers = [] if self.workers is None else ["--workers", str(self.workers)]
                    command = shlex.join([
                        "beyondprop",
                        "compare",
                        "--resume",
                        str(observer.path),
                        *settings.code,
                        *workers,
                    ])
                    observer.command("Stopped; the state is saved. Go on with:", command)
                raise

    def _train(self, settings: Settings, observer: Lines) -> Path:
        from beyondprop.lab.comparing import comparison
        from beyondprop.lab.comparing.plan import prepare
        from beyondprop.lab.runs.config import naming
        from beyondprop.lab.runs.directory import check_free

        said: set[str] = set()

        def progress(done: int, total: int | None, name: str) -> None:
            if name not in said and not observer.quiet:
                said.add(name)
                observer.note(f"Downloading {name}" + (f" ({total / 1e6:.0f} MB)" if total else ""), style="dim")

        with usage():
            if self.out is not None:
                check_free(self.out)
            with contextlib.nullcontext() if self.resume is None else naming(self.resume):
                plan = prepare(settings, progress=progress)
        if self.resume is not None:
            try:
                return comparison.go_on(plan, self.resume, observer, self.workers)
            except ValueError as error:
                if not str(error).startswith("The state is"):
                    raise
                raise ValueError(
                    f"{str(self.resume / 'config.toml')!r} and a file of checkpoints/ do not belong together: {error} Put the "
                    "original back, or delete that checkpoint: its training begins again then."
                ) from error
        return comparison.run(plan, self.out, observer, self.workers)

    def _recorded(self, path: Path) -> Settings:
        from beyondprop.lab.runs.config import naming
        from beyondprop.lab.runs.recorded import read_config

        default, given = Options(), self.options
        with naming(path):
            settings = Settings.from_config(read_config(path))
        again = [net for net in given.nets if net not in settings.nets or ".py:" not in net]
        changed = [
            "rule" if f.name == "rules" else f.name
            for f in dataclasses.fields(Settings)
            if f.name not in ("plugins", "nets") and getattr(given, f.name) != getattr(default, f.name)
        ] + ["net"] * bool(again)
        changed += ["out"] * (self.out is not None)
        if changed:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"--resume goes on with the recorded settings; leave out {flags}.")
        if given.plugins:  # in place of the recorded ones: the files may lie elsewhere now
            settings = dataclasses.replace(settings, plugins=given.plugins)
        missing = [flag for flag in settings.code if flag.removeprefix("--net=") not in given.nets]
        missing = [flag for flag in missing if flag.removeprefix("--plugin=") not in given.plugins]
        if missing and not self.trust:
            raise ValueError(
                untrusted(path, missing, "Give them again beside --resume if you know them, or --trust all of them.")
            )
        return settings
