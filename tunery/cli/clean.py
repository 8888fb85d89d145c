"""`tunery files clean`: a new file of a file's rows, and what became of each."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tunery.cli import show
from tunery.cli.report import ReportUnavailable
from tunery.datasets.cleaning.order import Action, ActionName, Cleaning, HeldOut, RowChoice

_SHOWN = 5
_Kinds = Annotated[list[str] | None, typer.Option(metavar="KIND", help="As in the report; several times for several.")]


def clean(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file with training rows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new file, JSON Lines.")],
    recommended: Annotated[bool, typer.Option("--recommended", help="What the report suggests for each kind.")] = False,
    drop: _Kinds = None,
    keep_one: _Kinds = None,
    redact: _Kinds = None,
    fix: _Kinds = None,
    drop_line: Annotated[list[int] | None, typer.Option(metavar="LINE", help="A row to drop.")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="A share of the rows for OUTPUT-held-out, without splitting groups.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed holds out the same rows.")] = 0,
    against: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file that must hold other rows.")
    ] = None,
    base: Annotated[Path | None, typer.Option(exists=True, help="A folder with tokenizer.json.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row that are trained.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Write a file's rows without duplicates, leaks, faults and personal data into a new file. Needs no server."""
    chosen: dict[ActionName, list[str] | None] = {"drop": drop, "keep_one": keep_one, "redact": redact, "fix": fix}
    order = Cleaning(
        actions=[Action(kind=kind, action=action) for action, kinds in chosen.items() for kind in kinds or ()],
        recommended=recommended,
        rows=RowChoice(drop=drop_line or []),
        held_out=None if held_out is None else _held_out(held_out, seed),
    )
    order.check(compared=against is not None)
    if output.exists() and output.samefile(file):
        raise typer.BadParameter("The file itself is never changed: name another one with --output.")
    try:
        from tunery.datasets.cleaning import cleaner
    except ModuleNotFoundError as error:
        raise ReportUnavailable(package=error.name) from None
    apart = output.with_name(f"{output.stem}-held-out{output.suffix}") if order.held_out else None
    done = cleaner.clean(
        file, output, order, held_out=apart, against=against, base=base, max_tokens=max_tokens
    ).as_dict()
    if as_json:
        sys.stdout.write(json.dumps(done, indent=1) + "\n")
    else:
        print_cleaning(done, file.name, [path.name for path in (output, apart) if path is not None])


def _held_out(share: float, seed: int) -> HeldOut:
    if not 0 < share <= 0.5:
        raise typer.BadParameter("--held-out is a share of the rows, over 0 and at most 0.5.")
    return HeldOut(share=share, seed=seed)


def print_cleaning(done: Mapping[str, Any], name: str, written: Sequence[str]) -> None:
    """What was done, as a table of kinds and the first rows of each. `written`: the new files' names."""
    counts = done["counts"]
    show.console.print(
        Text.assemble(
            (name, "bold"),
            f" has {counts['rows']:,} rows: {counts['dropped']:,} dropped, {counts['changed']:,} changed, ",
            (written[0], "bold"),
            f" has {counts['kept']:,}",
            f", {written[1]} {counts['held_out']:,}." if counts["held_out"] else ".",
        ),
        soft_wrap=True,
    )
    show.console.print()
    kinds = sorted(done["kinds"].items(), key=lambda item: -sum(item[1].values()))
    rows = ((kind, of["dropped"] or "", of["changed"] or "", _lines(done, kind)) for kind, of in kinds)
    show.table(("kind", "dropped", "changed", "lines"), rows, empty="Nothing had to be done.")
    if done["changed"]:
        show.console.print()
        changed = ((one["line"], one["before"], one["after"]) for one in done["changed"][:_SHOWN])
        show.table(("line", "before", "after"), changed, empty="")


def _lines(done: Mapping[str, Any], kind: str) -> str:
    named = sorted({one["line"] for part in ("dropped", "changed") for one in done[part] if one["kind"] == kind})
    more = f" and {len(named) - _SHOWN:,} more" if len(named) > _SHOWN else ""
    return ", ".join(map(str, named[:_SHOWN])) + more
