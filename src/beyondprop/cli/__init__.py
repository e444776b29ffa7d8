"""The command line: `beyondprop compare`, `report`, `list`, `reproduce` and `ledger`, one file a command."""

from beyondprop.cli.main import main

__all__ = ["main"]
