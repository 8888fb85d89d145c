"""`tunery files clean`: a new file of a file's rows, and what became of each."""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tunery import ids
from tunery.cli import output
from tunery.cli.client import ApiClient, Refused
from tunery.cli.options import ColumnNames, connect, new_file, parse_columns
from tunery.cli.report import POLL_SECONDS, ReportUnavailable, existing, no_such_file
from tunery.datasets.cleaning.order import Action, ActionName, Cleaning, HeldOut, RowChoice
from tunery.datasets.rules import LEAST_EXAMPLES
from tunery.errors import TuneryError

_SHOWN = 5
_NOTHING = (
    "Choose at least one action: --recommended, --drop KIND, --keep-one KIND, --redact KIND, --fix KIND, "
    "--drop-line LINE or --held-out SHARE."
)
_Kinds = Annotated[
    list[str] | None, typer.Option(metavar="KIND", help="A kind of finding, as in the report; repeatable.")
]


def clean(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(help="A local file, for which no server is needed, or the id of an uploaded one.")
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=new_file,
            help="The new file in JSON Lines; for an uploaded file, a local copy of it.",
        ),
    ] = None,
    recommended: Annotated[
        bool, typer.Option("--recommended", help="Apply the report's suggestion for each kind.")
    ] = False,
    drop: _Kinds = None,
    keep_one: _Kinds = None,
    redact: _Kinds = None,
    fix: _Kinds = None,
    drop_line: Annotated[
        list[int] | None,
        typer.Option(metavar="LINE", help="A row to drop, by its line as in the report; repeatable."),
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Fraction of the rows to write to OUTPUT-held-out, without splitting groups.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed holds out the same rows.")] = 0,
    against: Annotated[str | None, typer.Option(help="A file or an id whose rows must not be in the file.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For a local file a folder with tokenizer.json; for an uploaded one a model.",
            show_default="an estimate",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Token limit of a row.")] = 2048,
    columns: ColumnNames = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a file's rows to a new file, without duplicates, leaks, faults and personal data."""
    chosen: dict[ActionName, list[str] | None] = {"drop": drop, "keep_one": keep_one, "redact": redact, "fix": fix}
    order = Cleaning(
        actions=[Action(kind=kind, action=action) for action, kinds in chosen.items() for kind in kinds or ()],
        recommended=recommended,
        rows=RowChoice(drop=drop_line or []),
        held_out=None if held_out is None else _held_out(held_out, seed),
        max_tokens=max_tokens,
        columns=parse_columns(columns),
    )
    if order == Cleaning(max_tokens=max_tokens, columns=order.columns):
        raise typer.BadParameter(_NOTHING)
    if Path(file).is_file():
        done, names = _clean_here(Path(file), target, order, existing("--against", against), existing("--base", base))
    elif file.startswith(ids.FILE):
        done, names = _clean_there(connect(context), file, target, order, against=against, base=base)
    else:
        raise no_such_file(file)
    if as_json:
        sys.stdout.write(json.dumps(done, indent=1) + "\n")
    else:
        print_cleaning(done, Path(file).name, names)


def _clean_here(
    file: Path, target: Path | None, order: Cleaning, against: Path | None, base: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Cleans a local file; returns what was done, and the new files' names. Raises ReportUnavailable."""
    if target is None:
        raise typer.BadParameter("Give the new file with --output.")
    if target.exists() and target.samefile(file):
        raise typer.BadParameter("The file itself is never changed: give another one with --output.")
    try:
        from tunery.datasets.cleaning import cleaner
        from tunery.datasets.report import answer_ends
    except ModuleNotFoundError as error:
        raise ReportUnavailable(package=error.name) from None
    written = [target, _apart(target)] if order.held_out else [target]
    # In a separate folder, so that a failing cleaning leaves existing files unchanged.
    with tempfile.TemporaryDirectory(prefix=".cleaning-", dir=target.parent) as folder:
        clean, *apart = (Path(folder) / path.name for path in written)
        held_out = apart[0] if apart else None
        ask = answer_ends.asking(base, order.max_tokens) if base else None
        with output.waiting("cleaning"):
            done = cleaner.clean(file, clean, order, held_out=held_out, against=against, base=base, ask=ask).as_dict()
        for path in written:
            (Path(folder) / path.name).replace(path)
    return done, [path.name for path in written]


def _clean_there(
    api: ApiClient, file: str, target: Path | None, order: Cleaning, **others: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Cleans a file on the server, with copies at `target`; returns what was done and the new ids.

    Raises Refused, and removes the empty files of a cleaning that failed.
    """
    body = order.model_dump(mode="json", exclude_defaults=True) | {key: id for key, id in others.items() if id}
    made = api.call("POST", f"/files/{file}/clean", json=body)["id"]
    with output.waiting("waiting for a worker") as status:
        while (found := api.call("GET", f"/files/{made}"))["status"] == "uploaded":
            status.update(f"cleaning: {api.call('GET', f'/files/{made}/cleaning')['progress']:.0%}")
            time.sleep(POLL_SECONDS)
    done = api.call("GET", f"/files/{made}/cleaning")
    new = [made] if done["held_out"] is None else [made, done["held_out"]]
    if found["status"] == "error":
        for id in new:
            with suppress(TuneryError):  # the reason matters more
                api.call("DELETE", f"/files/{id}")
        raise Refused(message=found["status_details"])
    if target is not None:
        for id, path in zip(new, (target, _apart(target)), strict=False):
            api.download(f"/files/{id}/content", path)
    return done, new


def _apart(target: Path) -> Path:
    return target.with_name(f"{target.stem}-held-out{target.suffix}")


def _held_out(fraction: float, seed: int) -> HeldOut:
    if not 0 < fraction <= 0.5:
        raise typer.BadParameter("--held-out is a fraction of the rows, above 0 and at most 0.5.")
    return HeldOut(share=fraction, seed=seed)


def print_cleaning(done: Mapping[str, Any], name: str, written: Sequence[str]) -> None:
    """Prints what was done, as a table of kinds and the first rows of each. `written`: the new files' names."""
    counts = done["counts"]
    output.console.print(
        Text.assemble(
            (name, "bold"),
            f" has {output.counted(counts['rows'], 'row')}: ",
            f"{counts['dropped']:,} dropped, {counts['changed']:,} changed, ",
            (written[0], "bold"),
            f" has {counts['kept']:,}",
            f", {written[1]} {counts['held_out']:,}." if counts["held_out"] else ".",
        ),
        soft_wrap=True,
    )
    if counts["kept"] < LEAST_EXAMPLES:
        kept = output.counted(counts["kept"], "row")
        said = f"{written[0]} has {kept}, but a training file needs at least {LEAST_EXAMPLES}: add rows."
        output.errors.print(said, soft_wrap=True)
    output.console.print()
    kinds = sorted(done["kinds"].items(), key=lambda item: -sum(item[1].values()))
    rows = ((kind, of["dropped"] or "", of["changed"] or "", _lines(done, kind)) for kind, of in kinds)
    output.table(("kind", "dropped", "changed", "lines"), rows, empty="Nothing had to be changed.")
    if done["changed"]:
        output.console.print()
        changed = ((one["line"], one["before"], one["after"]) for one in done["changed"][:_SHOWN])
        output.table(("line", "before", "after"), changed, empty="")


def _lines(done: Mapping[str, Any], kind: str) -> str:
    named = sorted({one["line"] for part in ("dropped", "changed") for one in done[part] if one["kind"] == kind})
    more = f" and {len(named) - _SHOWN:,} more" if len(named) > _SHOWN else ""
    return ", ".join(map(str, named[:_SHOWN])) + more
