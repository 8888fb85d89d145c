"""`tunery jobs create --dry-run`: what a job would be."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from tunery.cli import output, quotes, report
from tunery.cli.client import ApiClient
from tunery.cli.reruns import ROOT
from tunery.cli.routes import as_commands
from tunery.planning import fitting
from tunery.planning.fitting import CardFit
from tunery.planning.memory import gib
from tunery.spec import Columns


def ask(api: ApiClient, body: Mapping[str, Any], uploaded: list[str]) -> dict[str, Any]:
    """Returns the server's answer once the training file's rows are counted. Removes the files uploaded for it."""
    try:
        columns = Columns.model_validate(body["columns"]).spelled if body.get("columns") else None
        report.fetch(api, body["training_file"], columns=columns)
        return api.call("POST", ROOT, json={**body, "dry_run": True})
    finally:
        for file in uploaded:
            api.call("DELETE", f"/files/{file}")


def print_job(job: Mapping[str, Any], warnings: Sequence[str], *, as_json: bool) -> None:
    """Prints what was decided, what the job needs, and all warnings."""
    if as_json:
        output.as_json(job)
    else:
        _print_fields(job)
    output.warnings([*warnings, *job["warnings"]])


def _print_fields(job: Mapping[str, Any]) -> None:
    if job["error"] is not None:
        output.console.print(
            Text(f"The job would fail: {as_commands(job['error']['message'])}", style="red"), soft_wrap=True
        )
    else:
        output.done("The job is valid. Nothing was stored.")
    knobs, checked = job["hyperparameters"], job["validation"]
    of = {device: f"{gib(need['bytes'])} at least" for device, need in job["memory"].items()}
    rate = job["learning_rate"]
    output.fields(
        [
            ("model", job["model"]),
            (
                "rows",
                f"{checked['examples']:,}, of which {checked['usable']:,} are usable" if checked["examples"] else None,
            ),
            ("technique", _technique(job["technique"])),
            ("epochs", knobs["n_epochs"]),
            ("batch size", knobs["batch_size"]),
            ("learning rate", None if rate is None else f"{rate:.2e}"),
            ("seed", job["seed"]),
            ("memory of a GPU", of.get("cuda")),
            ("or of a host without a GPU", of.get("cpu")),
            *fitting.in_words(map(CardFit.model_validate, job["cards"])),
            *quotes.fields(job),
        ]
    )


def _technique(said: Mapping[str, Any] | None) -> str | None:
    if said is None:
        return None
    return f"{said['type']}, r {said['r']}, alpha {said['alpha']:g}" if "r" in said else str(said["type"])
