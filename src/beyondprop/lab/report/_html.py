"""The report: one HTML file that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._alignment import final_alignment
from beyondprop.lab.report._figures import Drawing, draw, metrics_of, split_of, write_png
from beyondprop.lab.report._style import Entry, beside, entries, run_labels, warm_entries
from beyondprop.lab.report._summary import ContenderSummary, best_of, summary, warm_starts
from beyondprop.lab.runs.files import write_atomically
from beyondprop.lab.runs.recorded import Run, read_run
from beyondprop.lab.runs.text import clean, clipped

_MOST = 1000  # characters of a text

# fmt: off
_SHARED = (
    "task", "data", "nets", "epochs", "warm_start", "batch_size", "sample", "schedule", "validation", "seeds", "threads",
)
# fmt: on


def write_report(*run_dirs: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, as one self-contained HTML file.

    Args:
        run_dirs: Run directories, one or more; with several, every label says which run it belongs to.
        output: The HTML file. By default `report.html` in the (first) run directory, with the figures as PNG
            files in `figures/` beside it.

    Returns:
        The HTML file. It is replaced whole or not at all.

    Raises:
        ValueError: No run directory was given, or a file in one is malformed.
        FileNotFoundError: A run directory or a file in it is missing.
    """
    if not run_dirs:
        raise ValueError("write_report needs one run directory or more, got none.")
    runs = [read_run(path) for path in run_dirs]
    shown = entries(runs)
    drawings = draw(shown, ["svg", "png"] if output is None else ["svg"], warm_entries(runs))
    if output is None:
        write_png(drawings, runs[0].path / "figures")
    page = _page(runs, shown, drawings, output)
    return write_atomically(
        runs[0].path / "report.html" if output is None else Path(output), page.encode("utf-8", "backslashreplace")
    )


def _page(runs: Sequence[Run], shown: Sequence[Entry], drawings: Sequence[Drawing], output: str | Path | None) -> str:
    metrics = metrics_of(shown)
    summaries = [s for run in runs for s in summary(run, metrics[0])]
    started = dict.fromkeys(str(run.env["started"]) for run in runs if run.env.get("started"))
    elsewhere = [] if output is None else ["--output", _from_here(Path(output))]
    head, body, note = _results(runs, shown, summaries)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=words.title(runs, summaries),
        under=" · ".join(run_labels(runs)) + (f" · started {', '.join(started)}" if started else ""),
        problems=_problems(runs, shown, summaries),
        results=(head, body),
        results_note=note,
        drawings=drawings,
        alignment=final_alignment(shown),
        values=run_labels(runs) if len(runs) > 1 else ["value"],
        settings=_side_by_side([_settings(run) for run in runs]),
        contenders=_contenders([*warm_entries(runs), *shown]),
        environment=_side_by_side([run.env for run in runs]),
        command=shlex.join(["beyondprop", "report", *(_from_here(run.path) for run in runs), *elsewhere]),
    )


def _problems(
    runs: Sequence[Run], shown: Sequence[Entry], summaries: Sequence[ContenderSummary]
) -> list[tuple[str, str, list[str]]]:
    """Return what went wrong or needs care, which comes before any number."""
    found: dict[str, list[str]] = {"failed": [], "warning": []}
    for run, label in zip(runs, beside(runs, " ({})"), strict=True):
        for row in (*run.failures, *run.warnings):
            where = [f"{key} {row[key]}" for key in ("seed", "step") if row.get(key) is not None]
            name = ", ".join([run.title(row["contender"]), *where])
            found[row["kind"]].append(Markup("<b>{}</b>{}: {}").format(name, label, clipped(row["message"], _MOST)))
    notes = found["warning"]
    notes += [f"{label}{note}" for run, label in zip(runs, beside(runs, "{}: "), strict=True) for note in run.notes]
    for entry, s in zip(shown, summaries, strict=True):
        if s.seeds_unfinished:
            which = f"seed{'s' * (len(s.seeds_unfinished) > 1)} {_value(list(s.seeds_unfinished))}"
            notes.append(f"{entry.label}: {which} did not reach {_value(entry.run.config.get('epochs'))} epochs.")
    differing = [key for key in _SHARED if len({json.dumps(r.config.get(key), default=str) for r in runs}) > 1]
    if differing:
        notes.append(f"The runs differ in {', '.join(differing)}: compare their numbers with that in mind.")
    if all(s.epochs is None for s in summaries):
        notes.append("No contender has a seed with an evaluation to report.")
    return [("Failures", "failure", found["failed"]), ("Warnings and notes", "warning", notes)]


def _results(
    runs: Sequence[Run], shown: Sequence[Entry], summaries: Sequence[ContenderSummary]
) -> tuple[list[str], list[list[str]], str]:
    """Return the head and the rows of the table of results, and what there is to say of it."""
    metrics, split = metrics_of(shown), split_of(shown)
    columns = words.columns(summaries, metrics, dict.fromkeys(name for run in runs for name in run.counters), split)
    same_task = len({(run.task, *run.config["nets"]) for run in runs}) == 1
    best = best_of(summaries, metrics[0]) if same_task else None
    body = []
    for entry, s, final, *cells in zip(shown, summaries, *columns.values(), strict=True):
        if s.final is None and s.seeds_failed:
            final = Markup('<span class="bad">failed</span>')
        elif s.final and not s.seeds_done:
            final += f" (epoch {s.epochs:.4g})"
        elif best is not None and s.comparable and s.final and s.final.mean == best:
            final = Markup("<b>★ {}</b>").format(final)
        body.append([_name(entry), final, *cells])
    lead = "Highest" if metrics[0].higher_is_better else "Lowest"
    spread = words.over_seeds(len(entry.counted) for entry in shown).capitalize()
    note = (
        f"{spread}; seconds, work and counts are medians. Std is the sample standard deviation. Best seen is each "
        f"seed's best evaluation, chosen by looking at the {split} data. Work counts gradient-equivalents: "
        "1 is what one backpropagation step on the same batch costs in multiply-adds. Seconds are training time only. "
    )
    note += f"★ {lead} mean among the contenders whose seeds all reached the end. " if best is not None else ""
    for label, run in zip(beside(runs, "{}: "), runs, strict=True):
        note += "".join(f"{label}{words.warm_start(s, run.metric)} " for s in warm_starts(run))
    return ["Contender", *columns], body, note


def _side_by_side(tables: Sequence[dict[str, Any]]) -> list[list[str]]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return [[key, *(_value(table.get(key)) for table in tables)] for key in keys]


def _settings(run: Run) -> dict[str, Any]:
    known = {key: run.config[key] for key in _SHARED if key != "validation" and key in run.config}
    return {key.replace("_", " "): value for key, value in known.items()} | {"evaluated on": f"{run.split} split"}


def _contenders(shown: Sequence[Entry]) -> list[list[str]]:
    return [
        [
            _name(entry),
            clipped(entry.contender.summary, _MOST) or words.DASH,
            ", ".join(f"{key} = {_value(value)}" for key, value in entry.contender.settings.items()) or words.DASH,
        ]
        for entry in shown
    ]


def _value(value: Any) -> str:
    if value is None:
        return words.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return clipped(json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value), _MOST)


def _name(entry: Entry) -> Markup:
    return Markup('<span class="swatch" style="background:{}"></span>{}').format(entry.color, entry.label)


def _from_here(path: Path) -> str:
    """Return the path from the working directory; its name alone where it lies elsewhere, as pages go from hand to hand."""
    path, here = path.resolve(), Path.cwd()
    return clean(path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name)
