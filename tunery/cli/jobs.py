"""`tunery jobs ...`"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tunery.cli import downloads, models, output, request, reruns, summary, watching
from tunery.cli.client import ApiClient, Refused
from tunery.cli.dry_run import ask as dry_run_of
from tunery.cli.dry_run import print_job as print_dry_run
from tunery.cli.files import upload_file
from tunery.cli.options import AsJson, ColumnNames, Limit, connect, parse_columns
from tunery.cli.reruns import ROOT
from tunery.cli.routes import as_commands

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")

FileOrId = Annotated[str, typer.Option(help="A file to upload, or the id of an uploaded one (file-...).")]
MaybeFileOrId = Annotated[str | None, typer.Option(help="A file or an id for the validation loss.")]


@app.command()
def create(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="A base, an alias or a tuned model.")],
    train: FileOrId,
    valid: MaybeFileOrId = None,
    test: Annotated[str | None, typer.Option(help="Rows that base and tuned model answer after training.")] = None,
    method: Annotated[str | None, typer.Option(help="supervised or dpo.", show_default="supervised")] = None,
    technique: Annotated[str | None, typer.Option(help="lora, qlora or full.", show_default="what fits")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale of the adapter.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Its peak.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the tuned model's name.")] = None,
    columns: ColumnNames = None,
    seed: int | None = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the request: name=JSON or a.b=JSON; repeatable."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "--wait", "-w", help="Wait for its end; exit status 1 unless it succeeds.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what the job would be.")] = False,
    json: AsJson = False,
) -> None:
    """Check a request and its files, upload them and create a job."""
    names = parse_columns(columns)
    given = {**locals(), "columns": names and names.named}
    body = request.build({name: given[name] for name in request.FLAGS}, set or [])
    request.check(body)
    files = request.local_files(body)
    api = connect(context)
    _check_model(api, body)
    stored = request.stored_files(api, body, files)
    warnings = request.check_files(body, request.sources(api, files, stored))
    uploaded = request.upload(body, files, lambda path: str(upload_file(api, path)["id"]))
    if dry_run:
        return print_dry_run(dry_run_of(api, body, uploaded), warnings, as_json=json)
    return _start(api, body, warnings, watch=watch, json=json)


def _start(api: ApiClient, body: request.Body, warnings: list[str], *, watch: bool, json: bool) -> None:
    job = api.call("POST", ROOT, json=body)
    if json:
        output.as_json(job)
    else:
        output.console.print(job["id"], soft_wrap=True)
    output.warnings([*warnings, *job["warnings"]])
    if watch:
        watching.watch(api, job["id"], known=warnings)
    elif not json:
        output.hint(f"tunery jobs watch {job['id']}")


def _check_model(api: ApiClient, body: request.Body) -> None:
    """Raises Refused where the model is unknown, not ready, or cannot be trained with the technique."""
    model = api.call("GET", downloads.model_route(body["model"]))
    if model["status"] != "ready":
        raise Refused(
            message=f"The model '{model['id']}' is {model['status']}. `tunery models show {model['id']}` has the "
            "details."
        )
    technique = (body.get("technique") or {}).get("type")
    if reason := (model.get("techniques") or {}).get(technique):
        raise Refused(message=f"The model '{model['id']}' cannot be trained with {technique}: {reason}")


@app.command("list")
def list_jobs(context: typer.Context, limit: Limit = 20, json: AsJson = False) -> None:
    """List the project's jobs, newest first."""
    found = connect(context).pages(ROOT, limit=limit)
    if json:
        return output.as_json(found)
    output.table(
        ("id", "status", "model", "age"),
        (
            (
                job["id"],
                output.status(job["status"]),
                job["fine_tuned_model"] or job["model"],
                output.age(job["created_at"]),
            )
            for job in found
        ),
        empty="No jobs yet: `tunery jobs create --model NAME --train FILE` starts one.",
    )
    return None


@app.command("show")
def show_job(context: typer.Context, job: str, json: AsJson = False) -> None:
    """Show a job."""
    found = connect(context).call("GET", f"{ROOT}/{job}")
    if json:
        return output.as_json(found)
    summary.print_job(found)
    return None


@app.command("get", hidden=True)
def get_job(context: typer.Context, job: str, json: AsJson = False) -> None:
    """Show a job: the name that other tools use for show."""
    show_job(context, job, json)


@app.command()
def metrics(
    context: typer.Context,
    job: str,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of steps.")] = 1000,
    json: AsJson = False,
) -> None:
    """Show the metrics of each step, oldest first."""
    found = connect(context).call("GET", f"{ROOT}/{job}/metrics", params={"limit": limit})["data"]
    if json:
        return output.as_json(found)
    names = ("train_loss", "valid_loss", "full_valid_loss", "task_score", "learning_rate", "grad_norm")
    columns = ("step", *(name for name in names if any(row.get(name) is not None for row in found)))
    rows = ([summary.short(row.get(column, "")) for column in columns] for row in found)
    output.table(columns, rows, empty=f"{job} has no metrics yet.")
    return None


@app.command()
def checkpoints(context: typer.Context, job: str, json: AsJson = False) -> None:
    """List the checkpoints of a job's last epochs, newest first."""
    found = connect(context).pages(f"{ROOT}/{job}/checkpoints", limit=100)
    if json:
        return output.as_json(found)
    rows = (
        (c["step_number"], c["fine_tuned_model_checkpoint"], summary.compact(c["metrics"], skip=("step",)))
        for c in found
    )
    output.table(
        ("step", "model", "metrics"), rows, empty=f"{job} has no checkpoint yet: one is made at the end of each epoch."
    )
    return None


@app.command()
def scorecard(
    context: typer.Context,
    job: str,
    rows: Annotated[bool, typer.Option("--rows", help="Each test row with both models' answers.")] = False,
    flipped: Annotated[
        bool | None, typer.Option(help="Only rows that exactly one of the two answers correctly.")
    ] = None,
    right: Annotated[
        bool | None,
        typer.Option("--right/--wrong", help="Only rows that the tuned model answers correctly, or incorrectly."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows.")] = 100,
    json: AsJson = False,
) -> None:
    """Compare base and tuned model on the test rows: the scores as JSON, or the rows."""
    if rows:
        asked = {name: value for name, value in (("flipped", flipped), ("right", right)) if value is not None}
        found = connect(context).pages(f"{ROOT}/{job}/scorecard/rows", limit=limit, **asked)
        return output.as_json(found) if json else summary.print_answers(found)
    shown = connect(context).call("GET", f"{ROOT}/{job}")
    if shown["scorecard"] is None:
        unscored = "it has no test file (`jobs create --test FILE`)"
        reason = unscored if shown["evaluation"]["test_file"] is None else f"it is {shown['status']}"
        raise Refused(message=f"{job} has no scorecard: {reason}.")
    output.as_json(shown["scorecard"])
    return None


@app.command()
def watch(context: typer.Context, job: str) -> None:
    """Follow a job to its end, with progress, loss and time left. Ctrl-C stops watching, not the job."""
    watching.watch(connect(context), job)


@app.command()
def events(context: typer.Context, job: str, limit: Limit = 100, json: AsJson = False) -> None:
    """List a job's events, oldest first."""
    found = list(reversed(connect(context).pages(f"{ROOT}/{job}/events", limit=limit)))
    if json:
        return output.as_json(found)
    colours = {"warn": "yellow", "error": "red"}
    for event in found:
        line = Text(f"{output.clock(event['created_at'])}  ", style="dim")
        output.console.print(
            line.append(as_commands(event["message"]), style=colours.get(event["level"], "not dim")), soft_wrap=True
        )
    return None


@app.command()
def logs(
    context: typer.Context,
    job: str,
    tail: Annotated[int, typer.Option(help="Only the last lines.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")] = False,
) -> None:
    """Print a job's log."""
    api, empty = connect(context), True
    for chunk in api.stream(f"{ROOT}/{job}/logs", tail=tail, follow=str(follow).lower()):
        empty = empty and not chunk
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    if empty and tail:
        found = api.call("GET", f"{ROOT}/{job}")
        raise Refused(message=f"{job} has no log: {summary.why_nothing(found)}")


@app.command()
def download(
    context: typer.Context,
    job: str,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder.", show_default="the job's id")
    ] = None,
    with_base: models.WithBase = False,
) -> None:
    """Download a finished job's files and verify their sha256."""
    api, folder = connect(context), target or Path(job)
    found = api.call("GET", f"{ROOT}/{job}")
    files = api.call("GET", f"{ROOT}/{job}/artifacts")["data"]
    if not files:
        gone = "its model was deleted."
        reason = gone if found["status"] == "succeeded" else summary.why_nothing(found)
        raise Refused(message=f"{job} has no files to download: {reason}")
    models.bring(api, f"{ROOT}/{job}", files, folder)
    if with_base:
        models.bring_base(api, api.call("GET", downloads.model_route(found["fine_tuned_model"]))["base_model"], folder)


def _deed(name: str, help: str) -> None:
    def command(context: typer.Context, job: str) -> None:
        found = connect(context).call("POST", f"{ROOT}/{job}/{name}")
        output.console.print(Text(f"{job} is ").append_text(output.status(found["status"])))

    command.__doc__ = help
    app.command(name)(command)


@app.command()
def publish(
    context: typer.Context,
    job: str,
    reason: Annotated[str, typer.Option(help="The reason, which is stored with the job.")],
) -> None:
    """Publish a model that is withheld by its job's gate or by the check of the served model."""
    found = connect(context).call("POST", f"{ROOT}/{job}/publish", json={"reason": reason})
    output.done(str(found["fine_tuned_model"]))


# Without a question: files and the checkpoints of finished epochs stay, and who cancels wants the device back at once.
_deed("cancel", "Cancel a job: its files and checkpoints are kept, but it cannot be resumed, as after `pause`.")
_deed("pause", "Pause a job: its state is saved and its worker freed.")
_deed("resume", "Resume a paused job.")
for command in (reruns.rerun, reruns.reproduce, reruns.reproduction):
    app.command()(command)
