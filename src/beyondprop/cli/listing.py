"""What there is: rules, networks and data sets, for `beyondprop list`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from beyondprop import data
from beyondprop.lab import registry
from beyondprop.lab.registry import load_plugins
from beyondprop.lab.training import schedules

if TYPE_CHECKING:
    from rich.console import Console


def inventory(plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Return the rules, nets, schedules and data sets as plain values.

    Raises:
        ImportError: if a plugin cannot be loaded.
    """
    load_plugins(plugins)
    rules = [
        {
            key: getattr(spec, key)
            for key in ("name", "title", "summary", "source", "lr", "grid", "schedule", "whole_set", "home", "page")
        }
        for spec in registry.rules
    ]
    sets = [_about(data.describe(name)) for name in data.names()]
    forms = {name: {spec.form: spec.summary for spec in registry.TABLES[name]} for name in ("net", "task")}
    return {"rules": rules, "nets": forms["net"], "tasks": forms["task"], "schedules": schedules.FORMS, "data": sets}


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `inventory` returned as tables."""
    rules = _table("Rules (--rule)", "name", "what it does", "source")
    for rule in found["rules"]:
        whole = " (whole set a step)" if rule["whole_set"] else ""
        rules.add_row(rule["name"], rule["summary"] + whole, rule["source"])
    forms = []
    for title, key in (
        ("Networks (--net)", "nets"),
        ("Tasks (--task)", "tasks"),
        ("Schedules (--schedule)", "schedules"),
    ):
        forms.append(_table(title, "form", "what it is"))
        for form, text in found[key].items():
            forms[-1].add_row(_plain(form), _plain(text))
    sets = _table("Data (--data)", "name", "what it is", "train", "test", "input", "at hand")
    for info in found["data"]:
        size = f"no, {info['download_bytes'] / 1e6:.0f} MB" if info["has_download"] else "no"
        sets.add_row(
            info["name"],
            info["description"],
            f"{info['train_size']:,}",
            f"{info['test_size']:,}",
            "x".join(map(str, info["input_shape"])),
            "yes" if info["at_hand"] else size,
        )
    for table in (rules, *forms, sets):
        console.print(table)
        console.print()


def _table(title: str, first: str, *rest: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, style="cyan", overflow="fold")
    for header in rest:
        table.add_column(header, justify="right" if header in ("train", "test") else "left", overflow="fold")
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # brackets in it are no markup


def _about(info: data.DatasetInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "description": info.description,
        "train_size": info.train_size,
        "test_size": info.test_size,
        "input_shape": list(info.input_shape),
        "num_classes": len(info.classes),
        "at_hand": data.at_hand(info.name),
        "download_bytes": info.download_bytes,
        "has_download": info.has_download,
        "home_page": info.home_page,
        "license": info.license,
    }
