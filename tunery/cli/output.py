"""Prints for commands: tables for people, JSON for programs."""

import json
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.status import Status
from rich.table import Table
from rich.text import Text

from tunery.cli.routes import as_commands
from tunery.local.terminal import literal_console, print_whole

console = literal_console()
errors = literal_console(stderr=True)

_COLOURS = {
    "succeeded": "green",
    "ready": "green",
    "processed": "green",
    "running": "cyan",
    "queued": "yellow",
    "validating_files": "yellow",
    "processing": "yellow",
    "uploaded": "yellow",
    "paused": "magenta",
    "failed": "red",
    "error": "red",
    "disabled": "red",
    "cancelled": "dim",
    "revoked": "dim",
}


def status(word: str) -> Text:
    return Text(word, style=_COLOURS.get(word, ""))


def age(moment: float | datetime | None) -> str:
    """Returns how long ago a moment was: `42s`, `5m`, `3h`, `12d`."""
    if moment is None:
        return "-"
    seconds = time.time() - (moment.timestamp() if isinstance(moment, datetime) else moment)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def counted(number: int, noun: str) -> str:
    """Returns `1 row` or `1,234 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def clock(moment: float) -> str:
    """Returns the local time of day."""
    return datetime.fromtimestamp(moment).astimezone().strftime("%H:%M:%S")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Prints a table. Ids are never cut: they are there to be copied."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        shown.add_column(column.upper(), no_wrap=True)
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row))
    if shown.row_count:
        print_whole(console, shown)
    else:
        errors.print(empty, style="dim")


def fields(pairs: Iterable[tuple[str, Any]]) -> None:
    """Prints name and value, one a line; absent values are left out."""
    shown = Table.grid(padding=(0, 2))
    for name, value in pairs:
        if value not in (None, "", [], {}):
            shown.add_row(Text(name, style="dim"), value if isinstance(value, Text) else Text(str(value)))
    print_whole(console, shown)


def as_json(value: Any) -> None:
    console.print_json(json.dumps(value), indent=2)


def waiting(what: str) -> Status:
    """Returns a context that shows on stderr what a command waits for."""
    return errors.status(Text(what))  # a string would be markup


def done(message: str) -> None:
    console.print(Text.assemble(("✓ ", "green"), as_commands(message)))


def failed(message: str) -> None:
    console.print(Text.assemble(("✗ ", "red"), as_commands(message)))


def warnings(texts: Iterable[str]) -> None:
    """Prints each warning once, on stderr: standard output holds what programs read."""
    for text in dict.fromkeys(texts):
        errors.print(Text.assemble(("Warning: ", "yellow"), as_commands(text)), soft_wrap=True)


def note(text: str) -> None:
    """Prints a remark on stderr."""
    errors.print(Text(as_commands(text), style="dim"), soft_wrap=True)


def hint(command: str) -> None:
    """Prints the command to run next on stderr."""
    note(f"Next: {command}")
