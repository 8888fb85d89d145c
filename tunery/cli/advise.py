"""`tunery advise`: whether to fine-tune on a file, and how."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, get_args

import typer
from rich.table import Table
from rich.text import Text

from tunery import ids
from tunery.baselines import verdict
from tunery.baselines.table import Row
from tunery.cli import output, report
from tunery.cli.baseline import print_table
from tunery.cli.client import ApiClient, Refused
from tunery.cli.options import AsJson, ColumnNames, connect, new_file, parse_columns
from tunery.datasets import token_rate
from tunery.planning import advice_page, advisor, fitting, serving_quote
from tunery.planning.advisor import Advice
from tunery.planning.recommendation import HEADLINES, Aim, Choice
from tunery.planning.serving_quote import ServingQuote
from tunery.rows import readers
from tunery.rows.errors import CannotRender
from tunery.rows.template import ChatTemplate
from tunery.spec import Columns, named_columns

_COLOURS: dict[Choice, str] = {"prompt": "yellow", "evaluate_both": "cyan", "fine_tune": "green", "retrieval": "red"}


@dataclass(frozen=True)
class _Answer:
    """Advice and what a server adds to it: a baseline's table, the currency of its costs, and a quote of serving."""

    advice: Advice
    rows: list[Row] = field(default_factory=list)
    currency: str = ""
    serving: ServingQuote | None = None


def advise(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(help="A local file, for which no server is needed, or the id of an uploaded one.")
    ],
    aim: Annotated[str, typer.Option(help=f"What the model should learn: {', '.join(get_args(Aim))}.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="For an uploaded file a model; for a local one a folder with config.json."),
    ] = None,
    valid: Annotated[
        str | None, typer.Option(help="Held-out rows (a file or an id), which are not counted as training rows.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="A baseline of the model, whose results the advice includes; only for an uploaded file."),
    ] = None,
    columns: ColumnNames = None,
    html: Annotated[Path | None, typer.Option(callback=new_file, help="Also write an HTML page to this file.")] = None,
    json: AsJson = False,
) -> None:
    """Recommend prompting, fine-tuning or retrieval for a file of rows, and settings for a fine-tune."""
    if aim not in get_args(Aim):
        raise typer.BadParameter(f"--aim {aim}: use {', '.join(get_args(Aim))}.")
    named = parse_columns(columns)
    if Path(file).is_file() and baseline is None:
        found = _Answer(_here(Path(file), aim, model, valid, named))
    elif Path(file).is_file():
        raise typer.BadParameter("A baseline belongs to the server: upload the file, and pass its id with --baseline.")
    elif file.startswith(ids.FILE):
        asked = {"file": file, "aim": aim, "model": model, "validation_file": valid, "baseline": baseline}
        found = _there(connect(context), **asked, columns=named_columns(named) or None)
    else:
        raise typer.BadParameter(f"{file}: no such file, and ids begin with {ids.FILE}")
    if html is not None:
        measured = [verdict.cells(row) for row in found.rows]
        page = advice_page.render(
            Path(file).name, aim, found.advice, measured=measured, currency=found.currency, serving=found.serving
        )
        html.write_text(page, encoding="utf-8")
    if json:
        output.as_json(found.advice.model_dump(mode="json"))
    else:
        if found.rows:
            print_table(found.rows, found.currency)
        print_advice(found.advice, Path(file).name, found.serving)
        _print_command(found.advice, "MODEL" if Path(file).is_file() else str(model), file, columns)


def _here(path: Path, aim: Any, model: str | None, valid: str | None, columns: Columns | None) -> Advice:
    """Returns the advice on a local file. Raises ReportUnavailable."""
    model_info = None if model is None else _model_info(Path(model))
    said = report.make(path, valid, base=None, max_tokens=2048, columns=columns)
    rate = None if model is None else _rate(path, Path(model), columns)
    return advisor.advise(advisor.rows_of(said, rate), aim, model_info=model_info, has_held_out=valid is not None)


def _rate(path: Path, folder: Path, columns: Columns | None) -> float | None:
    """Learned tokens for each byte of an answer; None where the folder has no tokenizer that can be read."""
    try:
        template = ChatTemplate.load(folder)
    except CannotRender:
        return None
    return token_rate.measure(readers.chunks_of(path), template, named_columns(columns))


def _model_info(folder: Path) -> dict[str, Any]:
    """Returns the sizes in a base's config.json. Raises BadParameter."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        instead = "Give a folder with config.json, omit --model, or upload the file and name a model of the server."
        raise typer.BadParameter(f"--model {folder}: it has no readable config.json. {instead}") from None
    sizes = {**config, **config.get("text_config", {})}
    if missing := [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if name not in sizes]:
        raise typer.BadParameter(f"--model {folder}: its config.json has no {', '.join(missing)}.")
    return {**sizes, "context_length": sizes.get("max_position_embeddings")}


def _there(api: ApiClient, **asked: Any) -> _Answer:
    """The server's advice on a file that has a report, a baseline's table, and the currency of its costs. Raises
    Refused where there is no report."""
    if asked["model"] is None:
        raise typer.BadParameter("An uploaded file needs --model: a base, an alias or a tuned model.")
    body = {name: value for name, value in asked.items() if value is not None}
    with output.waiting("waiting for the report") as status:
        while (found := api.call("POST", "/fine_tuning/advice", json=body))["status"] in ("queued", "running"):
            status.update(f"{found['status']}: {found['progress']:.0%}")
            time.sleep(report.POLL_SECONDS)
    if found["advice"] is None:
        raise Refused(message=found["error"])
    rows = [Row.model_validate(row) for row in found["table"]]
    serving = found["serving"] and ServingQuote.model_validate(found["serving"])
    return _Answer(Advice.model_validate(found["advice"]), rows, found["currency"], serving)


def print_advice(made: Advice, name: str, serving: ServingQuote | None = None) -> None:
    """Prints the headline, the reasons, the settings with their reasons, and the warnings."""
    output.console.print(Text(HEADLINES[made.recommendation], style=f"bold {_COLOURS[made.recommendation]}"))
    of = "all" if made.rows.usable == made.rows.total else f"{made.rows.usable:,} of"
    output.console.print(Text(f"{name}: {of} {made.rows.total:,} rows are usable.", style="dim"), soft_wrap=True)
    for reason in made.reasons:
        _print_point("-", reason.text)
    output.console.print(Text("\nIf you fine-tune:", style="bold"))
    _print_settings(made)
    output.fields(fitting.in_words(made.cards))
    if serving is not None and (ways := serving_quote.in_words(serving)):
        output.console.print(Text(f"\n{serving_quote.heading(serving)}:", style="bold"))
        output.fields(ways)
    for warning in made.warnings:
        _print_point("!", warning, style="yellow")


def _print_command(made: Advice, model: str, file: str, columns: str | None) -> None:
    """Prints the command that creates the job. MODEL: a local file's folder is no name of a model on a server."""
    settings = [f"--set {field}={value}" for field, value in _leaves(made.settings)]
    mapped = [f"--columns {quote(columns)}"] if columns else []
    words = ["tunery jobs create", f"-m {quote(model)}", f"--train {quote(file)}", *settings, *mapped]
    output.console.print()
    output.console.print(Text(" ".join(words), style="dim"), soft_wrap=True)


def _print_point(sign: str, text: str, style: str = "") -> None:
    table = Table.grid(padding=(0, 1))
    table.add_row(Text(sign, style=style), Text(text, style=style))
    output.console.print(table)


def _print_settings(made: Advice) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(ratio=1)
    for one in made.suggestions:
        table.add_row(one.field, "-" if one.value is None else str(one.value), one.text)
    output.console.print(table)


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
