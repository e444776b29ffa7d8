"""Figures, a terminal table and a self-contained HTML report from recorded run directories.

Importing this package draws nothing and loads neither matplotlib nor rich; the functions that need them do.
"""

from __future__ import annotations

from beyondprop.lab.report._figures import figures
from beyondprop.lab.report._html import write_report
from beyondprop.lab.report._summary import ContenderSummary, Spread, summary, to_json
from beyondprop.lab.report._table import table
from beyondprop.lab.runs.recorded import ContenderInfo, Run, read_run

__all__ = [
    "ContenderInfo",
    "ContenderSummary",
    "Run",
    "Spread",
    "figures",
    "read_run",
    "summary",
    "table",
    "to_json",
    "write_report",
]
