"""The ledger: published beside measured for every recipe that was recorded, as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beyondprop.lab import recipes
from beyondprop.lab.recipes._base import REACHED, SHOWN, Recipe, Result

_HEAD = """# Reproduction

Published numbers of the methods here beside what this library measures, made by `beyondprop ledger` from the results in
`reproduction/`; rows that speak against a method are left in. `beyondprop reproduce ID` runs a recipe again, with `--quick`
a short version whose numbers are no reproduction. Learning rates are chosen from each rule's own grid of four on rows held
out of the training rows, never on test rows, unless a recipe says otherwise; for offline rules the number is 1 over the
weight of their penalties.

*reached*: the mean over seeds keeps to what is asked for; *missed*: it does not; *shown*: nothing is asked for.
"""


def ledger(folder: Path, output: Path) -> str:
    """Return the ledger of all results in a folder, in the order of the recipes' ids.

    Args:
        folder: of `ID.json`, and `ID.png` where there is a figure.
        output: where the ledger will be, which its links start from.

    Raises:
        FileNotFoundError: if there is no result.
        ValueError: if one is damaged, or of a short version.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"There is no recorded result (*.json) in {str(folder)!r}.")
    results = [Result.read(file) for file in files]
    for file, result in zip(files, results, strict=True):
        if result.quick:
            raise ValueError(f"{str(file)!r} is of the short version, which is no reproduction; record the full one.")
        if result.recipe != file.stem:
            raise ValueError(f"{str(file)!r} is a result of {result.recipe!r}; it must be named {result.recipe}.json.")
    parts = [_HEAD, _overview(results)]
    for file, result in zip(files, results, strict=True):
        parts.append(_section(result, recipes.get(result.recipe)))
        if (figure := file.with_suffix(".png")).is_file():
            link = Path(os.path.relpath(figure, output.parent)).as_posix()
            parts.append(f"![{recipes.get(result.recipe).title}]({link})\n")
    missing = sorted(set(recipes.names()) - {result.recipe for result in results})
    if missing:
        parts.append("## Not yet recorded\n\n" + ", ".join(f"`{name}`" for name in missing) + "\n")
    return "\n".join(parts)


def _overview(results: Sequence[Result]) -> str:
    lines = ["| recipe | | reached | missed | shown |", "|---|---|---|---|---|"]
    for result in results:
        verdicts = [row.verdict for row in result.rows]
        counts = [str(verdicts.count(v) or "") for v in (REACHED, "missed", SHOWN)]
        lines.append(
            f"| [`{result.recipe}`](#{result.recipe}) | {recipes.get(result.recipe).title} | {' | '.join(counts)} |"
        )
    return "\n".join(lines) + "\n"


def _section(result: Result, recipe: Recipe) -> str:
    lines = [f"## {result.recipe}", "", f"{recipe.title}. {recipe.source}", "", recipe.about, ""]
    lines += ["| | published | asked for | measured | |", "|---|---|---|---|---|"]
    for row in result.rows:
        verdict = f"**{row.verdict}**" if row.verdict == "missed" else row.verdict
        cells = [_cell(c) for c in (row.label, row.published, row.asked, row.shown)]
        lines.append("| " + " | ".join([*cells, verdict + (f"; {_cell(row.note)}" if row.note else "")]) + " |")
    lines += ["", _made(result), ""]
    return "\n".join(lines)


def _made(result: Result) -> str:
    on = result.environment
    versions = ", ".join(f"{key} {on[key]}" for key in ("torch", "beyondprop", "commit") if on.get(key))
    minutes = round(result.seconds / 60)
    text = f"Recorded {result.date}, {minutes} minute{'s' * (minutes != 1)}, {versions}."
    return text + (f" {_settings(result.settings)}" if result.settings else "")


def _settings(settings: dict[str, Any]) -> str:
    said = []
    for part, values in settings.items():
        if isinstance(values, dict) and "lr" in values:
            edge = values.get("at_edge", ())
            marks = {name: " (at the edge of its grid)" if name in edge else "" for name in values["lr"]}
            rates = "; ".join(f"{name}: {lr:g}{marks[name]}" for name, lr in values["lr"].items() if lr is not None)
            said.append(f"Learning rates, {part}: {rates}.")
    return " ".join(said)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
