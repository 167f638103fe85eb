"""Reports: one self-contained page a run, its figures, and tables for the terminal and the documentation."""

from __future__ import annotations

from dynablocks.reporting.data import BlockRow, Example, ReportData, StepRow, block_rows, step_rows
from dynablocks.reporting.html import write_report
from dynablocks.reporting.tables import markdown_table, summary_table

__all__ = [
    "BlockRow",
    "Example",
    "ReportData",
    "StepRow",
    "block_rows",
    "markdown_table",
    "step_rows",
    "summary_table",
    "write_report",
]
