"""What a worker makes the comparison's plan of: the settings, and what was handed over from Python, pickled by name."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from beyondprop.lab import registry
from beyondprop.lab.comparing.plan import Plan, prepare
from beyondprop.lab.comparing.settings import Settings
from beyondprop.lab.registry import RuleSpec

_REMEDY = (
    "Put it at the top of a module that can be imported, in a plugin or a net FILE.py:FUNCTION; or leave out workers."
)


@dataclass(frozen=True)
class Setup:
    """What a worker prepares the same plan from.

    Attributes:
        settings: with the device, the threads and the epochs that they came down to.
        handed: what was handed over, pickled, by what messages call it.
        begun: as the plan has it.
        folder: the folder that paths are relative to.
        config: what the plan must come to: rules, nets and tasks are looked up, and may be others elsewhere.
        rows: checksum of the task's rows, for the same reason.
    """

    settings: Settings
    handed: Mapping[str, bytes]
    begun: Mapping[str, float]
    folder: str
    config: Mapping[str, Any]
    rows: int

    @classmethod
    def of(cls, plan: Plan) -> Setup:
        """Return a plan's.

        Raises:
            ValueError: if something was handed over that cannot be pickled; the message names it, and says what can.
        """
        nets, rules = plan.handed.get("nets") or {}, plan.handed.get("rules") or ()
        things = {f"net {name}": net for name, net in nets.items()} | {f"rule {spec.name}": spec for spec in rules}
        if plan.handed.get("task") is not None:
            things["task"] = plan.handed["task"]
        handed = {what: _pickled(what, thing) for what, thing in things.items()}
        return cls(plan.settings, handed, dict(plan.begun), os.getcwd(), plan.config(), _checksum(plan))

    def prepared(self) -> Plan:
        """Return the plan, prepared again in this process.

        Raises:
            ValueError: if something cannot be loaded here, or is not what it is there; the message names it.
        """
        if not Path(self.folder).is_dir():
            raise ValueError(f"The folder {self.folder!r}, which paths are relative to, is not there.")
        os.chdir(self.folder)
        registry.load_plugins(self.settings.plugins)  # what was handed over may name their rules
        found = {what: _unpickled(what, content) for what, content in self.handed.items()}
        nets = {what.removeprefix("net "): net for what, net in found.items() if what.startswith("net ")}
        rules = [spec for what, spec in found.items() if what.startswith("rule ")]
        plan = prepare(self.settings, task=found.get("task"), nets=nets, rules=rules)
        plan = replace(plan, begun=self.begun)
        config = plan.config()
        for key in (*self.config, *config):
            if self.config.get(key) != config.get(key):
                raise ValueError(f"{key} is {config.get(key)!r} here and {self.config.get(key)!r} there. {_REMEDY}")
        if _checksum(plan) != self.rows:
            raise ValueError(
                f"The rows of {plan.task.name} are others here than there; put the same files in both places."
            )
        return plan


def _checksum(plan: Plan) -> int:
    found = 0
    for name in ("x_train", "y_train", "x_test", "y_test"):
        rows = getattr(plan.task, name, None)
        if isinstance(rows, Tensor) and rows.layout == torch.strided:
            found = zlib.crc32(rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, found)
    return found


class _Pickler(pickle.Pickler):
    """Functions without an importable name, such as the lambdas of rules, go by the rule that has them."""

    def persistent_id(self, obj: Any) -> tuple[str, ...] | None:
        if isinstance(obj, FunctionType | type) and obj.__module__ == "__main__":
            raise pickle.PicklingError(f"{obj.__qualname__} is in the script, which workers do not import")
        if not isinstance(obj, FunctionType) or "<" not in obj.__qualname__:
            return None
        names = (spec.name for spec in registry.rules if spec.build is obj)
        if (name := next(names, None)) is not None:
            return "registered", name
        names = (name for name, spec in _held(obj.__module__) if spec.build is obj)
        return None if (name := next(names, None)) is None else (obj.__module__, name)


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: tuple[str, str]) -> Any:
        module, name = pid
        if module == "registered":
            return registry.rules.get(name).build
        __import__(module)
        return dict(_held(module))[name].build


def _held(module: str) -> Iterator[tuple[str, RuleSpec]]:
    """Yield the rules that a module has in its variables, alone or in tuples, by their places."""
    for name, value in list(vars(sys.modules[module]).items()):
        several = value if isinstance(value, tuple | list) else [value]
        yield from ((f"{name}[{i}]", spec) for i, spec in enumerate(several) if isinstance(spec, RuleSpec))


def _pickled(what: str, thing: Any) -> bytes:
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump(thing)
    except Exception as error:  # whatever pickling calls may raise what it likes
        raise ValueError(f"{what} cannot be handed to workers: {type(error).__name__}: {error}. {_REMEDY}") from error
    return stream.getvalue()


def _unpickled(what: str, content: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:
        raise ValueError(f"{what} is not known here: {type(error).__name__}: {error}. {_REMEDY}") from error
