"""`tunery baseline`: prompting measured on rows of one's own, before anything is trained."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tunery import ids
from tunery.baselines import verdict
from tunery.baselines.table import Row
from tunery.cli import output
from tunery.cli.client import ApiClient, Refused
from tunery.cli.files import upload_file
from tunery.cli.options import AsJson, ColumnNames, connect, parse_columns
from tunery.cli.report import POLL_SECONDS
from tunery.spec import named_columns

ROOT = "/fine_tuning/baselines"
_COLOURS = {"met": "green", "maybe": "yellow", "no": "red"}


def baseline(
    context: typer.Context,
    eval_file: Annotated[
        str,
        typer.Argument(help="Rows with the expected answers: a file to upload, an id, or a baseline's id to show it."),
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base's id or alias.")] = None,
    examples: Annotated[str | None, typer.Option(help="Rows that may be shown as examples: the training file.")] = None,
    shots: Annotated[str, typer.Option(help="auto, or numbers of examples, such as 0,4,8.")] = "auto",
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Also with the examples nearest to each question.")
    ] = False,
    target: Annotated[
        str | None, typer.Option(help="What is good enough: exact=0.9, or 0.9 for the primary metric.")
    ] = None,
    compare: Annotated[list[str] | None, typer.Option(help="Another model; repeatable.")] = None,
    max_rows: Annotated[int, typer.Option(help="Maximum number of eval rows.")] = 200,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Token limit of an answer; absent: set by the longest expected one.")
    ] = None,
    external: Annotated[
        str | None,
        typer.Option(metavar="MODEL@URL", help="Also ask a model behind an OpenAI-compatible endpoint: NAME@URL."),
    ] = None,
    external_price: Annotated[
        str | None, typer.Option(help="Its price per million tokens of prompts and of answers: 0.5,1.5.")
    ] = None,
    external_key: Annotated[
        str | None, typer.Option(envvar="TUNERY_EXTERNAL_KEY", help="Its key; preferably set in the environment.")
    ] = None,
    columns: ColumnNames = None,
    json: AsJson = False,
) -> None:
    """Score a base with prompts, without and with examples, against a target."""
    api, named = connect(context), parse_columns(columns)
    if eval_file.startswith(ids.BASELINE):
        made = api.call("GET", f"{ROOT}/{eval_file}")
    else:
        if model is None:
            raise typer.BadParameter("Name the base with --model.")
        body: dict[str, Any] = {"model": model, "shots": _shots(shots), "retrieval": "nearest" if nearest else "none"}
        body |= {"target": _target(target), "compare": compare or [], "max_rows": max_rows}
        body |= {"max_new_tokens": "auto" if max_new_tokens is None else max_new_tokens}
        body |= {"external": _external(external, external_price, external_key)}
        body |= {"columns": named_columns(named) or None}
        files = {"eval_file": _id(api, eval_file), "examples_file": None if examples is None else _id(api, examples)}
        created = api.call("POST", ROOT, json=body | files)
        for warning in created["warnings"]:
            output.errors.print(Text(warning, style="yellow"), soft_wrap=True)
        made = _wait(api, created["id"])
    if json:
        return output.as_json(made)
    print_baseline(made)
    return None


def _id(api: ApiClient, file: str) -> str:
    if Path(file).is_file():
        return str(upload_file(api, Path(file))["id"])
    if file.startswith(ids.FILE):
        return file
    raise typer.BadParameter(f"{file}: no such file, and ids begin with {ids.FILE}")


def _shots(text: str) -> str | list[int]:
    if text == "auto":
        return text
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--shots {text}: use auto, or numbers such as 0,4,8.") from None


def _target(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    name, _, least = text.rpartition("=")
    try:
        return {"metric": name or None, "at_least": float(least)}
    except ValueError:
        raise typer.BadParameter(f"--target {text}: use a metric and a fraction, such as exact=0.9.") from None


def _external(text: str | None, price: str | None, key: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    model, _, rest = text.partition("@http")
    if not model or not rest:
        raise typer.BadParameter(f"--external {text}: use a model and a base URL, such as NAME@https://HOST/v1.")
    return {"model": model, "base_url": f"http{rest}", "api_key": key, "price_per_million": _price(price)}


def _price(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        prompt, answer = (float(one) for one in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--external-price {text}: use two numbers, such as 0.5,1.5.") from None
    return {"prompt": prompt, "answer": answer}


def _wait(api: ApiClient, baseline_id: str) -> dict[str, Any]:
    """Returns the baseline once it has ended. Ctrl-C stops only the waiting."""
    with output.waiting("waiting for a worker") as status:
        while (found := api.call("GET", f"{ROOT}/{baseline_id}"))["status"] in ("queued", "running"):
            status.update(f"{baseline_id}: {found['status']} {found['progress']:.0%}")
            time.sleep(POLL_SECONDS)
    return found


def print_baseline(made: dict[str, Any]) -> None:
    """Prints the table, what meets the target, and the next command. Raises Refused if there is no table."""
    if made["status"] != "succeeded":
        raise Refused(message=f"Baseline {made['id']} is {made['status']}. {made['error'] or ''}".strip())
    rows = [Row.model_validate(row) for row in made["table"]]
    print_table(rows, made["currency"])
    if made["left_out"]:
        excluded = (
            f"{output.counted(made['left_out'], 'example')} {'was' if made['left_out'] == 1 else 'were'} excluded"
        )
        output.console.print(Text(f"{excluded}: an eval row asks the same.", style="dim"))
    if (target := made["target"]) is not None:
        found = None if made["cheapest"] is None else Row.model_validate(made["cheapest"])
        output.console.print(Text(verdict.of_target(target["at_least"], found).text), soft_wrap=True)
    output.hint(f"tunery advise FILE --aim AIM -m {made['model']} --baseline {made['id']}")


def print_table(rows: list[Row], currency: str) -> None:
    """Prints a baseline's table, a line for each way to get answers."""
    shown = [verdict.cells(row) for row in rows]
    columns = [name for name in (*verdict.COLUMNS, "model") if any(cells[name] != "-" for cells in shown)]
    headings = [f"{currency} per 1,000" if name == "per 1,000" else name for name in columns]
    lines = ([_cell(cells, name) for name in columns] for cells in shown)
    output.table(headings, lines, empty="Nothing was measured.")
    for cells in shown:
        if cells["error"]:
            output.console.print(Text(f"{cells['what']}: {cells['error']}", style="yellow"), soft_wrap=True)


def _cell(cells: dict[str, str], name: str) -> Text:
    return Text(cells[name], style=_COLOURS.get(cells[name], "") if name == "target" else "")
