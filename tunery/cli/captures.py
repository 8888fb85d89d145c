"""`tunery captures ...`: keep requests to a model, say what answers were worth, make files of them."""

import json
import textwrap
from typing import Annotated, Any, Literal

import typer

from tunery.cli import downloads, output
from tunery.cli.options import Yes, confirm, connect

app = typer.Typer(no_args_is_help=True, help="The project's captured requests to models, and feedback on them.")

Model = Annotated[str, typer.Argument(help="A base, a tuned model or a checkpoint.")]


@app.command()
def start(
    context: typer.Context,
    model: Model,
    keep_days: Annotated[int, typer.Option(min=1, max=365, help="Days after which a request is deleted.")] = 30,
) -> None:
    """Capture the project's requests to a model from now on, with personal data redacted."""
    found = connect(context).call("POST", _route(model), json={"keep_days": keep_days})
    output.done(f"requests to {found['model']} are captured and kept for {_days(found)}")


@app.command("show")
def show_capture(context: typer.Context, model: Model) -> None:
    """Count the captured, rated and corrected requests."""
    found = connect(context).call("GET", _route(model))
    kept = f"for {_days(found)}" if found["enabled"] else "no"
    counts = ((name, found[name]) for name in ("requests", "good", "bad", "corrected"))
    output.fields((("kept", kept), *((name, str(count)) for name, count in counts)))


@app.command("list")
def list_requests(
    context: typer.Context,
    model: Model,
    rated: Annotated[
        Literal["good", "bad", "corrected", "unrated"] | None, typer.Option(help="Only requests with this rating.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="The last id of the previous page.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
) -> None:
    """List captured requests with their answers, newest first."""
    asked = {name: value for name, value in (("rated", rated), ("after", after), ("limit", limit)) if value is not None}
    page = connect(context).call("GET", f"{_route(model)}/requests", params=asked)
    rows = [(one["id"], output.age(one["created_at"]), _said(one), _text(one["messages"][-1]), _text(one["answer"]))
            for one in page["data"]]  # fmt: skip
    output.table(("id", "age", "rated", "asked", "answered"), rows, empty="no captured requests")
    if page["has_more"]:
        output.hint(f"tunery captures list {model} --after {page['data'][-1]['id']}")


@app.command()
def stop(context: typer.Context, model: Model, yes: Yes = False) -> None:
    """Stop capturing, and delete what was captured."""
    api = connect(context)
    if count := api.call("GET", _route(model))["requests"]:
        requests = output.counted(count, "captured request")
        confirm(f"Permanently delete {requests} to {model}, with their feedback?", yes=yes)
    found = api.call("DELETE", _route(model))
    output.done(f"requests to {found['model']} are no longer captured; deleted: {found['removed']}")


@app.command()
def rate(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="The answer's id: chatcmpl-... or resp_...")],
    rating: Annotated[Literal["good", "bad"] | None, typer.Argument(help="The rating.")] = None,
    correction: Annotated[str | None, typer.Option(help="The correct answer.")] = None,
) -> None:
    """Rate or correct an answer."""
    body = {"id": id, "rating": rating, "correction": correction}
    found = connect(context).call("POST", "/feedback", json=body)
    corrected = ", corrected" if found["correction"] else ""
    output.done(f"{id}: {found['rating'] or 'not rated'}{corrected}")


@app.command("file")
def make_file(
    context: typer.Context,
    model: Model,
    format: Annotated[Literal["chat", "preference"], typer.Option(help="Chat rows, or preference pairs.")] = "chat",
    answers: Annotated[
        list[str] | None,
        typer.Option(help="good, corrected or unrated; repeatable.", show_default="good and corrected"),
    ] = None,
) -> None:
    """Create a training or test file from captured requests; print its id."""
    body: dict[str, Any] = {"format": format, **({"answers": answers} if answers else {})}
    found = connect(context).call("POST", f"{_route(model)}/files", json=body)
    output.console.print(found["id"], soft_wrap=True)


def _days(capture: dict[str, Any]) -> str:
    return output.counted(capture["keep_days"], "day")


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
