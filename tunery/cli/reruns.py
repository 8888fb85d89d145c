"""`tunery jobs rerun`, `reproduce` and `reproduction`: an earlier job again, and both beside each other."""

import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.text import Text

from tunery.cli import output, request, watching
from tunery.cli.client import ApiClient
from tunery.cli.options import AsJson, connect

ROOT = "/fine_tuning/jobs"
_WEIGHTS = ".safetensors"
Tolerance = Annotated[float | None, typer.Option(help="Maximum relative difference of a loss.", show_default="0.005")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field to change: name=JSON or a.b=JSON, as in jobs create; repeatable."),
]
Watch = Annotated[
    bool, typer.Option("--watch", "--wait", "-w", help="Wait for its end; exit status 1 unless it succeeds.")
]


def rerun(
    context: typer.Context,
    job: str,
    seed: Annotated[int | None, typer.Option(help="Another seed.")] = None,
    set: Settings = None,
    watch: Watch = False,
    json: AsJson = False,
) -> None:
    """Start a job with the files, seed and decided settings of an earlier one, except for the given changes."""
    api = connect(context)
    again = start(api, job, {"seed": seed}, set or [])
    if json:
        output.as_json(again)
    else:
        output.console.print(again["id"], soft_wrap=True)
    output.warnings(again["warnings"])
    if watch:
        watching.watch(api, again["id"])
    elif not json:
        output.hint(f"tunery jobs watch {again['id']}")


def start(api: ApiClient, job: str, flags: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Creates the new job and returns it. Technique and method are the job's own unless a setting names another."""
    changes = request.merge(flags, settings)
    if "technique" in changes or "method" in changes:
        shown = api.call("GET", f"{ROOT}/{job}")
        types = {name: (shown.get(name) or {}).get("type") for name in ("technique", "method")}
        changes = request.complete(changes, {name: kind for name, kind in types.items() if kind})
    return api.call("POST", f"{ROOT}/{job}/rerun", json=changes)


def reproduce(
    context: typer.Context,
    job: str,
    wait: Annotated[
        bool,
        typer.Option("--wait", "--watch", "-w", help="Wait for its end and compare: exit status 1 if it differs."),
    ] = False,
    tolerance: Tolerance = None,
    json: AsJson = False,
) -> None:
    """Run an earlier job again, unchanged, and compare both: inputs, hardware, losses, weights and scores."""
    api = connect(context)
    again = start(api, job, {}, [])
    if wait:
        _follow(api, again["id"], in_silence=json)
        return _show(api, again["id"], tolerance, json)
    if json:
        return output.as_json(again)
    output.console.print(again["id"], soft_wrap=True)
    output.hint(f"tunery jobs reproduction {again['id']}")
    return None


def reproduction(context: typer.Context, job: str, tolerance: Tolerance = None, json: AsJson = False) -> None:
    """Compare a rerun with its original job. Exit status 1 unless it is reproduced."""
    _show(connect(context), job, tolerance, json)


def _follow(api: ApiClient, job: str, *, in_silence: bool) -> None:
    """Waits until the job has ended; shows a bar unless `in_silence`."""
    if not in_silence:
        return watching.watch(api, job)
    while api.call("GET", f"{ROOT}/{job}")["status"] not in watching.FINAL:
        time.sleep(1)
    return None


def _show(api: ApiClient, job: str, tolerance: float | None, json: bool) -> None:
    """Prints the comparison. Exits with 1 unless the job is reproduced."""
    query = {} if tolerance is None else {"tolerance": tolerance}
    found = api.call("GET", f"{ROOT}/{job}/reproduction", params=query)
    if json:
        output.as_json(found)
    elif found["status"] == "pending":
        output.note(f"{job} and {found['rerun_of']} have not both ended. Wait with `tunery jobs watch {job}`.")
    else:
        _print(found)
    if found["status"] != "reproduced":
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    """Prints what is equal on a line, what differs in a table, and the verdict."""
    parts = ("inputs", "environment", "weights", "scores")
    pairs = [pair for part in parts for pair in found[part]]
    output.note("equal: " + ", ".join(_equal(pairs)))
    if unknown := [pair["name"] for pair in pairs if pair["equal"] is None]:
        output.note("not known for both: " + ", ".join(unknown))
    different = [pair for pair in pairs if pair["equal"] is False]
    if different:
        rows = ((pair["name"], _short(pair["original"]), _short(pair["rerun"])) for pair in different)
        output.table(("differs", "original", "rerun"), rows, empty="")
    for line in _curves(found["losses"]):
        output.console.print(line, soft_wrap=True)
    output.console.print(_verdict(found), soft_wrap=True)


def _equal(pairs: list[dict[str, Any]]) -> list[str]:
    """Returns the names of what is equal; of a group, such as `versions.torch` is of, its own where all of it is."""
    groups = {pair["name"]: pair["name"].partition(".")[0] for pair in pairs if not pair["name"].endswith(_WEIGHTS)}
    broken = {groups.get(pair["name"]) for pair in pairs if not pair["equal"]}
    named = (pair["name"] for pair in pairs if pair["equal"])
    return list(dict.fromkeys(name if groups.get(name, name) in broken else groups.get(name, name) for name in named))


def _curves(losses: Iterable[dict[str, Any]]) -> Iterable[str]:
    for curve in losses:
        first, second = curve["steps"]
        if curve["compared"] < max(first, second):
            yield f"{curve['name']}: {first} steps and {second}, {curve['compared']} of them in both"
        if curve["max_relative_difference"] is not None:
            most = f"{curve['max_relative_difference']:.2e} at step {curve['at_step']}"
            yield f"{curve['name']}: largest relative difference {most}, of {curve['compared']} compared"


def _short(value: Any) -> str:
    """Returns a value in short: a digest by its beginning, an object by its entries."""
    text = "" if value is None else str(value)
    return text[:12] if len(text) == 64 and " " not in text else text


def _verdict(found: dict[str, Any]) -> Text:
    if found["status"] == "reproduced":
        how = "the weights are equal, bit for bit" if found["bitwise"] else f"losses within {found['tolerance']:g}"
        return Text.assemble(("✓ ", "green"), f"{found['job']} reproduces {found['rerun_of']}: {how}")
    return Text.assemble(("✗ ", "red"), f"{found['job']} differs from {found['rerun_of']}")
