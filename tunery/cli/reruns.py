"""`tunery jobs rerun`: an earlier job again, with what is changed."""

from typing import Annotated, Any

import typer

from tunery.cli import request, show, watching
from tunery.cli.options import AsJson, connect
from tunery.cli.remote import Remote

ROOT = "/fine_tuning/jobs"
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field that is to be another: name=JSON or a.b=JSON, as in jobs create."),
]
Watch = Annotated[
    bool, typer.Option("--watch", "--wait", "-w", help="Stay until it ends; exit status 1 unless it succeeds.")
]


def rerun(
    context: typer.Context,
    job: str,
    seed: Annotated[int | None, typer.Option(help="Another seed.")] = None,
    set: Settings = None,
    watch: Watch = False,
    json: AsJson = False,
) -> None:
    """Start a job like an earlier one: its files, its seed and the numbers that were decided, but for what is set."""
    api = connect(context)
    again = start(api, job, {"seed": seed}, set or [])
    if json:
        show.as_json(again)
    else:
        show.console.print(again["id"], soft_wrap=True)
    show.warnings(again["warnings"])
    if watch:
        watching.watch(api, again["id"])
    elif not json:
        show.hint(f"tunery jobs watch {again['id']}")


def start(api: Remote, job: str, flags: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Creates the new job and returns it. Technique and method are the job's own unless a setting names another."""
    changes = request.merge(flags, settings)
    if "technique" in changes or "method" in changes:
        shown = api.call("GET", f"{ROOT}/{job}")
        types = {name: (shown.get(name) or {}).get("type") for name in ("technique", "method")}
        changes = request.complete(changes, {name: kind for name, kind in types.items() if kind})
    return api.call("POST", f"{ROOT}/{job}/rerun", json=changes)
