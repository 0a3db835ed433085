"""How commands read their surroundings and print: JSON for programs, tables for people."""

from __future__ import annotations

import json
import sys
from os import environ, geteuid
from typing import TYPE_CHECKING, Any

from nearpath import log
from nearpath.errors import NearpathError
from nearpath.place import Place

if TYPE_CHECKING:
    import argparse

    from rich.console import Console
    from rich.table import Table

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
# Columns where there is no terminal: nothing gets cut in a log or a ticket.
_WIDE = 160

Commands = Any  # argparse._SubParsersAction[argparse.ArgumentParser], which is private


def add_command(
    commands: Commands, name: str, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a command's parser, with texts kept as they are written."""
    import argparse

    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every command has which prints data."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def root_place() -> Place:
    """Where this node's nearpath is; only root can look.

    Raises:
        NearpathError: we are not root.
    """
    if geteuid() != 0:
        raise NearpathError("needs root (BPF maps, network namespaces)", "use sudo")
    return Place.from_environ(environ)


def print_json(data: object) -> None:
    """Print data for programs."""
    print(json.dumps(data, indent=2))


def plain(text: object) -> str:
    """A text from outside with control characters made visible."""
    return log.plain(str(text))


def console(*, stderr: bool = False) -> Console:
    """A rich console: colours on terminals only, NO_COLOR and TERM=dumb are respected."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _WIDE
    return made


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house's style.

    Args:
        right: columns that hold numbers.
    """
    from rich import box
    from rich.table import Table

    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    made = Table(box=box.SIMPLE_HEAD if utf8 else box.ASCII2, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made
