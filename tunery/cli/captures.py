"""`tunery captures ...`: keep requests to a model, say what answers were worth, make files of them."""

import json
import textwrap
from typing import Annotated, Any, Literal

import typer

from tunery.cli import downloads, output
from tunery.cli.options import connect

app = typer.Typer(no_args_is_help=True, help="Requests to models that the project keeps, and what came of them.")

Model = Annotated[str, typer.Argument(help="A base, a tuned model or a checkpoint.")]


@app.command()
def start(
    context: typer.Context,
    model: Model,
    keep_days: Annotated[int, typer.Option(min=1, max=365, help="Days after which a request is removed.")] = 30,
) -> None:
    """Keep the project's requests to a model from now on, without personal data."""
    found = connect(context).call("POST", _route(model), json={"keep_days": keep_days})
    output.done(f"requests to {found['model']} are kept for {found['keep_days']} days")


@app.command("show")
def show_capture(context: typer.Context, model: Model) -> None:
    """How many requests are kept, and how many were rated or corrected."""
    found = connect(context).call("GET", _route(model))
    kept = f"for {found['keep_days']} days" if found["enabled"] else "no"
    counts = ((name, found[name]) for name in ("requests", "good", "bad", "corrected"))
    output.fields((("kept", kept), *((name, str(count)) for name, count in counts)))


@app.command("list")
def list_requests(
    context: typer.Context,
    model: Model,
    rated: Annotated[
        Literal["good", "bad", "corrected", "unrated"] | None, typer.Option(help="Only those that were rated so.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="The last id of the page before.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """The requests that are kept, newest first, with their answers."""
    asked = {name: value for name, value in (("rated", rated), ("after", after), ("limit", limit)) if value is not None}
    page = connect(context).call("GET", f"{_route(model)}/requests", params=asked)
    rows = [(one["id"], output.age(one["created_at"]), _said(one), _text(one["messages"][-1]), _text(one["answer"]))
            for one in page["data"]]  # fmt: skip
    output.table(("id", "age", "rated", "asked", "answered"), rows, empty="no request is kept")
    if page["has_more"]:
        output.hint(f"tunery captures list {model} --after {page['data'][-1]['id']}")


@app.command()
def stop(context: typer.Context, model: Model) -> None:
    """Keep no more, and remove what was kept."""
    found = connect(context).call("DELETE", _route(model))
    output.done(f"requests to {found['model']} are not kept; {found['removed']} were removed")


@app.command()
def rate(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="The answer's id: chatcmpl-... or resp_...")],
    rating: Annotated[Literal["good", "bad"] | None, typer.Argument(help="What it was worth.")] = None,
    correction: Annotated[str | None, typer.Option(help="What should have been answered.")] = None,
) -> None:
    """Say what an answer was worth."""
    body = {"id": id, "rating": rating, "correction": correction}
    found = connect(context).call("POST", "/feedback", json=body)
    corrected = ", corrected" if found["correction"] else ""
    output.done(f"{id}: {found['rating'] or 'not rated'}{corrected}")


@app.command("file")
def make_file(
    context: typer.Context,
    model: Model,
    format: Annotated[Literal["chat", "preference"], typer.Option(help="Rows of chats, or of pairs.")] = "chat",
    answers: Annotated[
        list[str] | None,
        typer.Option(help="good, corrected, unrated; may be repeated.", show_default="good and corrected"),
    ] = None,
) -> None:
    """Make a training or test file of what was kept; prints its id."""
    body: dict[str, Any] = {"format": format, **({"answers": answers} if answers else {})}
    found = connect(context).call("POST", f"{_route(model)}/files", json=body)
    output.console.print(found["id"], soft_wrap=True)


def _said(one: dict[str, Any]) -> str:
    """Returns the feedback on an answer: its rating and its correction."""
    correction = one["correction"] and f"should be: {_text(one['correction'])}"
    return ", ".join(filter(None, (one["rating"], correction))) or "-"


def _text(message: dict[str, Any]) -> str:
    """Returns the beginning of a message on one line."""
    content = message.get("content")
    if not isinstance(content, str):
        content = json.dumps(content or message.get("tool_calls"), ensure_ascii=False)
    return textwrap.shorten(content, 60, placeholder="...")


def _route(model: str) -> str:
    return f"{downloads.model_route(model)}/capture"
