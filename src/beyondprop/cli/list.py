"""`beyondprop list`: what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from beyondprop.cli.usage import Debug, Flag, fields, usage, write_json

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class List:
    """Show the rules, networks and data sets that there are."""

    plugin: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE", help_behavior_hint="(repeatable)")] = ()
    """Python file or module that registers rules of your own."""
    json: Flag = False
    """Print it as JSON."""
    debug: Debug = False

    def run(self) -> int:
        """Do it; return the exit code."""
        from beyondprop.cli.terminal import Terminal

        with usage():
            found = _inventory(self.plugin)
        if self.json:
            write_json(found)
        else:
            _show(found, Terminal())
        return 0


def _inventory(plugins: Sequence[str]) -> dict[str, Any]:
    """Return the rules, nets, tasks, schedules and data sets as plain values."""
    from beyondprop import data
    from beyondprop.lab import registry
    from beyondprop.lab.training import schedules

    registry.load_plugins(plugins)
    about = ("name", "title", "summary", "source", "lr", "grid", "least_batch", "schedule", "whole_set", "home", "page")
    rules = [fields(spec, *about) for spec in registry.rules]
    nets, tasks = ({spec.form: spec.summary for spec in registry.TABLES[name]} for name in ("net", "task"))
    sets = [
        fields(info, "name", "description", "train_size", "test_size", "input_shape")
        | {"num_classes": len(info.classes), "at_hand": data.at_hand(info.name)}
        | fields(info, "download_bytes", "has_download", "home_page", "license")
        for info in map(data.describe, data.names())
    ]
    return {"rules": rules, "nets": nets, "tasks": tasks, "schedules": schedules.FORMS, "data": sets}


def _show(found: dict[str, Any], console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, header in enumerate(headers):
            justify = "right" if header in ("train", "test") else "left"
            names = None if i else min(20, max((len(row[0]) for row in rows), default=0))  # whole in a narrow terminal
            shown.add_column(header, style="" if i else "cyan", justify=justify, overflow="fold", min_width=names)
        for row in rows:
            shown.add_row(*map(Text, row))  # brackets in it are no markup
        console.print(shown)
        console.print()

    rules = []
    for rule in found["rules"]:
        where = " · ".join(filter(None, [rule["home"], f"docs/{rule['page']}.md" if rule["page"] else ""]))
        summary = rule["summary"] + (" (whole set a step)" if rule["whole_set"] else "")
        rules.append((rule["name"], summary, "\n".join(filter(None, [rule["source"], where]))))
    table("Rules (--rule)", ("name", "what it does", "source; public name · page"), rules)
    forms = {"Networks (--net)": "nets", "Tasks (--task)": "tasks", "Schedules (--schedule)": "schedules"}
    for title, key in forms.items():
        table(title, ("form", "what it is"), list(found[key].items()))
    sets = []
    for info in found["data"]:
        absent = f"no, {info['download_bytes'] / 1e6:.0f} MB" if info["has_download"] else "no"
        sizes = [f"{info[key]:,}" for key in ("train_size", "test_size")]
        shape = "x".join(map(str, info["input_shape"]))
        sets.append((info["name"], info["description"], *sizes, shape, "yes" if info["at_hand"] else absent))
    table("Data (--data)", ("name", "what it is", "train", "test", "input", "at hand"), sets)
