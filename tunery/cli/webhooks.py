"""`tunery webhooks ...`"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tunery.cli import output
from tunery.cli.options import AsJson, Limit, Yes, connect, delete_found

app = typer.Typer(no_args_is_help=True, help="Endpoints that receive events, such as a job's end.")
ROOT = "/webhook_endpoints"

Endpoint = Annotated[str, typer.Argument(help="The endpoint's id (we_...).")]


@app.command()
def create(
    context: typer.Context,
    url: Annotated[
        str, typer.Argument(help="The receiver's URL: https and public, unless the operator allows others.")
    ],
    name: Annotated[str, typer.Option(help="A name for people.")] = "webhook",
    event: Annotated[list[str] | None, typer.Option(help="An event's type; repeatable.", show_default="all")] = None,
) -> None:
    """Create an endpoint; its signing secret is shown only once."""
    api = connect(context)
    types = event or api.call("GET", "/webhook_event_types")["data"]
    made = api.call("POST", ROOT, json={"name": name, "url": url, "event_types": types})
    output.note(f"{made['id']} receives {', '.join(types)}. Its signing secret, shown only once:")
    output.console.print(made["signing_secret"], soft_wrap=True)


@app.command()
def update(
    context: typer.Context,
    endpoint: Endpoint,
    url: Annotated[str | None, typer.Option(help="The receiver's URL. Enables a disabled endpoint again.")] = None,
    name: Annotated[str | None, typer.Option(help="A name for people.")] = None,
    event: Annotated[list[str] | None, typer.Option(help="An event's type; repeatable; replaces all others.")] = None,
) -> None:
    """Change an endpoint's URL, name or events. Its signing secret stays the same."""
    changes = {"url": url, "name": name, "event_types": event or None}
    given = {field: value for field, value in changes.items() if value is not None}
    if not given:
        raise typer.BadParameter("say what to change: --url, --name or --event")
    changed = connect(context).call("POST", f"{ROOT}/{endpoint}", json=given)
    to = f"{', '.join(changed['event_types'])} at {changed['url']}"
    output.done(f"{changed['id']}, {changed['name']}, receives {to}")


@app.command("list")
def list_endpoints(context: typer.Context, limit: Limit = 50, json: AsJson = False) -> None:
    """List the project's endpoints, newest first."""
    api = connect(context)
    found = api.pages(ROOT, limit=limit)
    if json:
        return output.as_json(found)
    every = set(api.call("GET", "/webhook_event_types")["data"])
    output.table(
        ("id", "name", "url", "status", "last delivery", "events", "age"),
        (_cells(endpoint, every) for endpoint in found),
        empty="No endpoints: `tunery webhooks create URL` makes one.",
    )
    return None


def _cells(endpoint: dict[str, Any], every: set[str]) -> Sequence[Any]:
    status = "disabled" if endpoint["disabled_reason"] else "active"
    chosen = endpoint["event_types"]
    events = "all" if every <= set(chosen) else ", ".join(name.removeprefix("fine_tuning.job.") for name in chosen)
    named = (endpoint["id"], endpoint["name"], endpoint["url"])
    last = endpoint["last_delivery"]
    outcome = f"{_outcome(last)} ({output.age(last['created_at'])})" if last else "-"
    return (*named, output.status(status), outcome, events, output.age(endpoint["created_at"]))


def _outcome(delivery: dict[str, Any]) -> str:
    """Returns `delivered`, or with what error how many tries failed: `pending: the receiver answered 500 (3 tries)`."""
    failed = [one["error"] for one in delivery["tries"] if one["error"]]
    if delivery["status"] == "delivered" or not failed:
        return str(delivery["status"])
    return f"{delivery['status']}: {failed[-1]} ({len(failed)} {'try' if len(failed) == 1 else 'tries'})"


@app.command("show")
def show_endpoint(context: typer.Context, endpoint: Endpoint) -> None:
    """Show an endpoint as JSON: why it is disabled, and what came of its last event."""
    output.as_json(connect(context).call("GET", f"{ROOT}/{endpoint}"))


@app.command("deliveries")
def list_deliveries(context: typer.Context, endpoint: Endpoint, limit: Limit = 20, json: AsJson = False) -> None:
    """List the events for an endpoint and what came of them, newest first."""
    found = connect(context).pages(f"{ROOT}/{endpoint}/deliveries", limit=limit)
    if json:
        return output.as_json(found)
    output.table(
        ("id", "event", "about", "outcome", "next try", "age"),
        (
            (
                one["id"],
                one["event_type"],
                one["data"]["id"],
                _outcome(one),
                output.clock(one["next_try_at"]) if one["next_try_at"] else "-",
                output.age(one["created_at"]),
            )
            for one in found
        ),
        empty="No deliveries yet: `tunery webhooks test ENDPOINT` sends a test event, which is not listed here.",
    )
    return None


@app.command("test")
def send_test(
    context: typer.Context,
    endpoint: Endpoint,
    event: Annotated[str, typer.Option(help="Its type.")] = "fine_tuning.job.succeeded",
) -> None:
    """Send a test event once. Exit status 1 unless the receiver answers with a 2xx status."""
    api = connect(context)
    if reason := api.call("GET", f"{ROOT}/{endpoint}")["disabled_reason"]:
        way = f"Enable it again: tunery webhooks update {endpoint} --url URL"
        output.warnings([f"{endpoint} is disabled and receives only tests: {reason} {way}"])
    status = api.call("POST", f"{ROOT}/{endpoint}/test", json={"event_type": event})["status_code"]
    if not 200 <= status < 300:
        output.failed(f"the receiver answered {status}: only a 2xx status accepts an event")
        raise typer.Exit(1)
    output.done(f"the receiver answered {status}")


@app.command()
def rotate(
    context: typer.Context,
    endpoint: Endpoint,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="The old secret also signs for 24 hours.")] = False,
) -> None:
    """Create a new signing secret, which is shown only once."""
    body = {"keep_old_secret_active_for_24_hours": keep_old}
    made = connect(context).call("POST", f"{ROOT}/{endpoint}/rotate_secret", json=body)
    output.note("Shown only once:")
    output.console.print(made["signing_secret"], soft_wrap=True)


@app.command()
def delete(context: typer.Context, endpoints: list[str], yes: Yes = False) -> None:
    """Delete endpoints."""
    delete_found(connect(context), ROOT, endpoints, named_by="url", yes=yes)
