"""How the benches show what they have found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import MET, MISSED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.report import Table


def machine() -> str:
    """``2 CPUs, AMD EPYC``."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    count = sum(line.startswith("processor") for line in lines)
    return f"{count} CPUs, {next(found, '?')}"


def present(
    conditions: dict[str, str],
    series: Sequence[Any],
    tables: Sequence[Table],
    *,
    as_json: bool,
) -> None:
    """Print the conditions and the tables, or as JSON the conditions and all runs.

    Args:
        series: have ``as_json()``.
    """
    if as_json:
        report = {"conditions": conditions, "series": [each.as_json() for each in series]}
        print(json.dumps(report, indent=1))
        return
    for key, value in conditions.items():
        print(f"{key}: {value}")
    for table in tables:
        print()
        _print_table(table)


def _print_table(table: Table) -> None:
    """Rows of missed targets are red on a terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else 160)
    shown = RichTable(title=table.title, title_justify="left")
    for index, head in enumerate(table.heads):
        shown.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    for row in table.rows:
        verdict = next((cell for cell in row if cell.startswith((MET, MISSED))), "")
        shown.add_row(*row, style="red" if verdict == MISSED else "")
    console.print(shown)
