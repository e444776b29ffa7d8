"""The report: one HTML file that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from beyondprop.lab.report import _words as words
from beyondprop.lab.report._alignment import final_alignment
from beyondprop.lab.report._css import CSS
from beyondprop.lab.report._figures import Drawing, draw, split_of
from beyondprop.lab.report._run import Row, Run, read_run
from beyondprop.lab.report._style import Entry, entries, run_labels, warm_entries
from beyondprop.lab.report._summary import RuleSummary, best_of, summary, warm_start
from beyondprop.lab.runs.files import write_atomically

# Besides the escaping, the page itself forbids every script and every request.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SHARED = ("data", "net", "epochs", "warm_start", "batch_size", "schedule", "validation", "seeds", "threads")


class _Markup(str):
    """Text that is HTML already; all other text is escaped where it enters the page."""

    __slots__ = ()


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
        for drawing in drawings:
            write_atomically(runs[0].path / "figures" / f"{drawing.name}.png", drawing.files["png"])
    page = _page(runs, shown, drawings, output)
    return write_atomically(runs[0].path / "report.html" if output is None else Path(output), page.encode())


def _page(runs: Sequence[Run], shown: Sequence[Entry], drawings: Sequence[Drawing], output: str | Path | None) -> str:
    summaries = [s for run in runs for s in summary(run)]
    title = words.title(
        (run.config["data"] for run in runs),
        (run.config["net"] for run in runs),
        len(summaries),
        (s.seeds for s in summaries),
    )
    elsewhere = [] if output is None else ["--output", _from_here(Path(output))]
    command = shlex.join(["beyondprop", "report", *(_from_here(run.path) for run in runs), *elsewhere])
    body = [
        _tag("h1", title),
        _tag("p", " · ".join(run_labels(runs)) + _started(runs), cls="under"),
        _problems(runs, shown, summaries),
        _section("Results", _results(runs, shown, summaries)),
        *(_section(d.heading, _figure(d)) for d in drawings),
        _section("Alignment at the end", _alignment(shown)),
        _section("Settings", _settings(runs, shown)),
        _section("Environment", _environment(runs)),
        _section("Make this report again", _tag("pre", command)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _problems(runs: Sequence[Run], shown: Sequence[Entry], summaries: Sequence[RuleSummary]) -> _Markup:
    """Return what went wrong or needs care, before any number; empty where nothing did."""
    labels = run_labels(runs) if len(runs) > 1 else [""]
    failures = [_message(run, row, labels[i]) for i, run in enumerate(runs) for row in run.failures]
    notes = [_message(run, row, labels[i]) for i, run in enumerate(runs) for row in run.warnings]
    notes += [f"{labels[i]}: {note}" if labels[i] else note for i, run in enumerate(runs) for note in run.notes]
    for entry, s in zip(shown, summaries, strict=True):
        if s.seeds_unfinished:
            noun = "seed" if len(s.seeds_unfinished) == 1 else "seeds"
            which = f"{noun} {', '.join(map(str, s.seeds_unfinished))}"
            notes.append(f"{entry.label}: {which} did not reach {_value(entry.run.config.get('epochs'))} epochs.")
    differing = [key for key in _SHARED if len({json.dumps(r.config.get(key), default=str) for r in runs}) > 1]
    if differing:
        notes.append(f"The runs differ in {', '.join(differing)}: compare their numbers with that in mind.")
    if not any(s.final for s in summaries):
        notes.append("No rule has a seed with an evaluation to report.")
    boxes = [("Failures", "failure", failures), ("Warnings and notes", "warning", notes)]
    return _join(
        _tag(
            "section",
            _join(_tag("h2", name), _tag("ul", _join(*(_tag("li", m) for m in said)))),
            cls=f"box {cls}",
        )
        for name, cls, said in boxes
        if said
    )


def _message(run: Run, row: Row, label: str) -> _Markup:
    where = [run.title(row["rule"]), *(f"{key} {row[key]}" for key in ("seed", "step") if row.get(key) is not None)]
    return _join(_tag("b", ", ".join(where)), f" ({label}): " if label else ": ", row["message"])


def _results(runs: Sequence[Run], shown: Sequence[Entry], summaries: Sequence[RuleSummary]) -> _Markup:
    metric = "test_accuracy" if any(s.metric == "test_accuracy" for s in summaries) else "test_loss"
    accuracy, split = metric == "test_accuracy", split_of(shown)
    same_task = len({(run.config["data"], run.config["net"]) for run in runs}) == 1
    best = best_of(summaries, lambda s: s.final and s.final.mean) if same_task else None
    name = words.metric_name(metric, split)
    first = {s.first_epoch for s in summaries if s.first_epoch is not None}
    after = f"after {first.pop():.3g} epochs".replace("after 1 epochs", "after 1 epoch") if len(first) == 1 else "first"
    head = ["Rule", name, "range", "std", "best seen", after]
    head += [f"{split} loss"] if accuracy else []
    head += ["train loss", "seconds", "work", "seeds"]
    body = []
    for entry, s in zip(shown, summaries, strict=True):
        final: str = words.mean(metric, s.final)
        if s.final is None and s.seeds_failed:
            final = _tag("span", "failed", cls="bad")
        elif s.final and not s.seeds_done and s.epochs is not None:
            final += f" (epoch {s.epochs:.4g})"
        elif best is not None and s.comparable and s.final and s.final.mean == best:
            final = _tag("b", f"★ {final}")
        std = words.value(metric, s.final.std) if s.final and s.final.std is not None else words.DASH
        cells = [_join(_swatch(entry), entry.label), final, words.interval(metric, s.final), std]
        cells += [words.mean(metric, s.best), words.mean(metric, s.first)]
        cells += [words.mean("test_loss", s.final_loss)] if accuracy else []
        cells += [words.mean("train_loss", s.final_train_loss), words.amount(s.seconds), words.amount(s.work)]
        body.append([*cells, words.seeds(s)])
    lead = "Highest" if accuracy else "Lowest"
    spread = words.over_seeds(len(entry.counted) for entry in shown).capitalize()
    note = (
        f"{spread}; seconds and work are medians. Std is the sample standard deviation. Best seen is each "
        f"seed's best evaluation, chosen by looking at the {split} data. Work counts gradient-equivalents: "
        "1 is what one backpropagation step on the same batch costs in multiply-adds. Seconds are training "
        "time only. " + (f"★ {lead} mean among the rules whose seeds all reached the end." if best is not None else "")
    )
    labels = run_labels(runs) if len(runs) > 1 else [""]
    for label, run in zip(labels, runs, strict=True):
        if run.warm_start is not None:
            note += (f"{label}: " if label else "") + words.warm_start(warm_start(run)) + " "
    return _join(_table(head, body, numbers=True), _tag("p", note, cls="note"))


def _alignment(shown: Sequence[Entry]) -> _Markup:
    found = final_alignment(shown)
    if not found:
        return _Markup()

    def cell(metric: str, spread: Any) -> str:
        if spread is None:
            return words.DASH
        if not math.isfinite(spread.mean):
            return "undefined"  # in a seed whose update or gradient is 0
        form = {"angle": ".1f", "norm_ratio": "#.3g"}.get(metric, ".3f")
        text = f"{spread.mean:{form}}"
        if spread.n < 2:
            return text
        between = words.DASH if spread.low >= 0 else " to "
        return f"{text} ({spread.low:{form}}{between}{spread.high:{form}})"

    rows = [
        [f.label, f.stage, f"{f.epoch:.3g}"] + [cell(k, getattr(f, k)) for k in ("cosine", "angle", "norm_ratio")]
        for f in found
    ]
    head = ["Rule", "stage", "epoch", "cosine", "angle (°)", "norm ratio"]
    note = (
        "Mean (range) over the seeds, at the last record. The norm ratio is the length of the update's "
        "direction over that of the gradient."
    )
    return _join(_table(head, rows, numbers=True), _tag("p", note, cls="note"))


def _settings(runs: Sequence[Run], shown: Sequence[Entry]) -> _Markup:
    labels = run_labels(runs)
    known = [key for key in _SHARED if key != "validation" and any(key in run.config for run in runs)]
    shared = _table(
        ["Setting", *(labels if len(runs) > 1 else ["value"])],
        [[key.replace("_", " "), *(_value(run.config.get(key)) for run in runs)] for key in known]
        + [["evaluated on", *(f"{run.split} split" for run in runs)]],
    )
    rules = [
        [
            _join(_swatch(entry), entry.label),
            entry.rule.summary or words.DASH,
            ", ".join(f"{key} = {_value(value)}" for key, value in entry.rule.settings.items()) or words.DASH,
        ]
        for entry in [*warm_entries(runs), *shown]
    ]
    return _join(shared, _table(["Rule", "what it does", "settings"], rows=rules))


def _environment(runs: Sequence[Run]) -> _Markup:
    keys = list(dict.fromkeys(key for run in runs for key in run.env))
    head = ["Environment", *(run_labels(runs) if len(runs) > 1 else ["value"])]
    return _table(head, [[key, *(_value(run.env.get(key)) for run in runs)] for key in keys])


def _figure(d: Drawing) -> _Markup:
    data = base64.b64encode(d.files["svg"]).decode()
    # The alternative text is the caption: a reader who cannot see the curves has the table for their numbers.
    image = _Markup(f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(d.heading + ". " + d.caption)}">')
    return _tag("figure", _join(image, _tag("figcaption", d.caption)))


def _started(runs: Sequence[Run]) -> str:
    started = dict.fromkeys(str(run.env["started"]) for run in runs if run.env.get("started"))
    return f" · started {', '.join(started)}" if started else ""


def _value(value: Any) -> str:
    if value is None:
        return words.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value)


def _swatch(entry: Entry) -> _Markup:
    return _Markup(f'<span class="swatch" style="background:{entry.color}"></span>')


def _section(heading: str, content: _Markup) -> _Markup:
    return _tag("section", _join(_tag("h2", heading), content)) if content else content


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> _Markup:
    top = _tag("tr", _join(*(_tag("th", cell) for cell in head)))
    body = _join(*(_tag("tr", _join(*(_tag("td", cell) for cell in row))) for row in rows))
    table = _tag("table", _join(_tag("thead", top), _tag("tbody", body)), cls="numbers" if numbers else "")
    return _tag("div", table, cls="scroll")


def _tag(name: str, content: str, cls: str = "") -> _Markup:
    start = f'<{name} class="{escape(cls)}">' if cls else f"<{name}>"
    return _Markup(f"{start}{_html(content)}</{name}>")


def _join(*parts: str | Iterable[str]) -> _Markup:
    flat = [p for part in parts for p in ([part] if isinstance(part, str) else part)]
    return _Markup("".join(map(_html, flat)))


def _html(text: str) -> str:
    return text if isinstance(text, _Markup) else escape(text)


def _from_here(path: Path) -> str:
    """Return the path from the working directory; its name alone where it lies elsewhere, as pages go from hand to hand."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name
