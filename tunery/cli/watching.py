"""Follows a job to its end."""

import time
from collections.abc import Iterable
from typing import Any

import typer

from tunery.cli import output, summary
from tunery.cli.client import ApiClient, Refused
from tunery.cli.routes import as_commands
from tunery.local.terminal import JobProgress, loss_curve

FINAL = ("succeeded", "failed", "cancelled")


class Events:
    """Returns a job's events as they arrive, each once."""

    def __init__(self, api: ApiClient, job: str) -> None:
        self._api, self._job = api, job
        self._seen: set[str] = set()

    def new(self) -> list[dict[str, Any]]:
        """Returns those not given before, oldest first: pages are read from the newest back to the first known one."""
        found: list[dict[str, Any]] = []
        while True:
            query = {"limit": 100, **({"after": found[-1]["id"]} if found else {})}
            page = self._api.call("GET", f"/fine_tuning/jobs/{self._job}/events", params=query)
            fresh = [event for event in page["data"] if event["id"] not in self._seen]
            found += fresh
            if len(fresh) < len(page["data"]) or not page["data"] or not page.get("has_more"):
                break
        self._seen |= {event["id"] for event in found}
        return [{**event, "message": as_commands(event["message"])} for event in reversed(found)]


def watch(api: ApiClient, job: str, *, known: Iterable[str] = ()) -> None:
    """One live line until the job ends, then its warnings; exit status 1 unless it succeeded.

    `known`: warnings that were printed already, as the end of the job's own texts.
    """
    events = Events(api, job)
    try:
        with JobProgress(output.console) as progress:
            while True:
                found = api.call("GET", f"/fine_tuning/jobs/{job}")
                progress.update(found, events.new())
                if found["status"] in FINAL:
                    break
                time.sleep(1)
    except KeyboardInterrupt:
        output.errors.print(f"\nThe job continues. Watch it again with `tunery jobs watch {job}`.", style="dim")
        raise typer.Exit(130) from None
    output.warnings(text for text in found["warnings"] if not any(_same(text, other) for other in known))
    _tell_end(found, progress)


def _same(warning: str, printed: str) -> bool:
    """Whether the job says about rows in two files what was said before the upload, with a file's name before it."""
    return warning.endswith(printed.partition(": ")[2])


def _tell_withheld(job: dict[str, Any], message: str) -> None:
    output.errors.print(message, soft_wrap=True)
    output.hint(f"tunery jobs publish {job['id']} --reason ...")


def _tell_end(job: dict[str, Any], progress: JobProgress) -> None:
    if job["status"] != "succeeded":
        raise Refused(message=f"{job['id']} {job['status']}. {(job.get('error') or {}).get('message') or ''}".strip())
    unicode = "utf" in output.console.encoding
    output.console.print(loss_curve(progress.losses, progress.valid_losses, unicode=unicode))
    if withheld := (job.get("gate") or {}).get("withheld_model"):
        _tell_withheld(job, f"The gate withholds {withheld}: {summary.gate_reasons(job['gate'])}")
        return
    if withheld := (job.get("served") or {}).get("withheld_model"):
        _tell_withheld(job, f"{withheld} is withheld: {summary.served_reason(job['served'])}")
        return
    output.done(str(job["fine_tuned_model"]))
