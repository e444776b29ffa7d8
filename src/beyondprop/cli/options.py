"""Types of options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from beyondprop.lab.comparing.settings import Flag

Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]

__all__ = ["Flag", "Folder"]
