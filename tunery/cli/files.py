"""`tunery files ...`"""

import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from tunery import ids
from tunery.cli import clean, file_check, output, preview
from tunery.cli.client import ApiClient
from tunery.cli.options import AsJson, ColumnNames, Limit, Yes, connect, delete_found, new_file, parse_columns
from tunery.cli.report import fetch as fetch_report
from tunery.cli.report import make as make_report
from tunery.cli.report import no_such_file, print_report
from tunery.datasets.report import page
from tunery.local.terminal import size
from tunery.rows.preview_model import Preview
from tunery.spec import LossOn

app = typer.Typer(no_args_is_help=True, help="Training, validation and test files.")
app.command("clean")(clean.clean)


def upload_file(api: ApiClient, path: Path, purpose: str = "fine-tune") -> dict[str, Any]:
    """Uploads a file as a stream, in constant memory."""
    with path.open("rb") as content:
        return api.call("POST", "/files", data={"purpose": purpose}, files={"file": (path.name, content)}, timeout=600)


@app.command()
def upload(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(exists=True, dir_okay=False, help="Files of rows: JSON Lines, JSON arrays, CSV, TSV, Parquet."),
    ],
    purpose: str = "fine-tune",
) -> None:
    """Upload files; print one id per line."""
    api = connect(context)
    for path in paths:
        file = upload_file(api, path, purpose)
        output.console.print(file["id"], soft_wrap=True)
        output.errors.print(f"{path.name}: {size(file['bytes'])}, {file['status']}", style="dim")


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JSON, CSV, TSV or Parquet files.")],
    role: Annotated[str, typer.Option(help="training, validation or test.")] = "training",
    columns: ColumnNames = None,
    json: AsJson = False,
) -> None:
    """Check local files without a server: format, columns, rows. Exit status 1 if one cannot be used for training."""
    names = parse_columns(columns)
    found = {path: file_check.judge(path, role, names) for path in paths}
    if json:
        output.as_json([{"file": str(path), **verdict.as_dict()} for path, verdict in found.items()])
    else:
        for path, verdict in found.items():
            file_check.print_verdict(path, verdict)
    if any(verdict.reason is not None for verdict in found.values()):
        raise typer.Exit(1)


@app.command("preview")
def preview_file(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="A local file, or the id of an uploaded one (file-...).")],
    model: Annotated[str, typer.Option("--model", "-m", help="A base on the server, or a folder with tokenizer.json.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, max=20, help="Number of rows from the file's start.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=16, help="The job's max_seq_length.")] = 2048,
    loss_on: Annotated[str, typer.Option(help="assistant, last_assistant or all.")] = "assistant",
    columns: ColumnNames = None,
    html: Annotated[
        Path | None, typer.Option(callback=new_file, help="Also write a page with coloured tokens to this file.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show which tokens of a file's first rows are trained, masked or cut, and check them.
    Exit status 1 if a check fails. A local file and folder need no server."""
    options = {"rows": rows, "max_tokens": max_tokens, "loss_on": loss_on}
    made = _preview(context, file, model, {**options, **({"columns": columns} if columns else {})})
    if html is not None:
        preview.write_page(made, Path(file).name, html)
    if json:
        output.as_json(made.model_dump(mode="json"))
    else:
        preview.print_preview(made)
    if not made.passed:
        raise typer.Exit(1)


def _preview(context: typer.Context, file: str, model: str, options: dict[str, Any]) -> Preview:
    if options["loss_on"] not in get_args(LossOn):
        raise typer.BadParameter(f"--loss-on {options['loss_on']}: use {', '.join(get_args(LossOn))}.")
    path, base = Path(file), Path(model)
    parse_columns(options.get("columns"))
    if not path.is_file() and not file.startswith(ids.FILE):
        raise no_such_file(file)
    if not path.is_file():
        return preview.fetch(connect(context), file, model=model, **options)
    if (base / "tokenizer.json").is_file():
        return preview.make(path, base, **options)
    if base.is_dir():
        raise typer.BadParameter(f"--model {model}: the folder has no tokenizer.json.")
    api = connect(context)
    stored = upload_file(api, path)["id"]  # the base is on the server, so the rows have to go there
    try:
        return preview.fetch(api, stored, model=model, **options)
    finally:
        api.call("DELETE", f"/files/{stored}")


@app.command("list")
def list_files(context: typer.Context, purpose: str | None = None, limit: Limit = 50, json: AsJson = False) -> None:
    """List the project's files, newest first."""
    found = connect(context).pages("/files", limit=limit, **({"purpose": purpose} if purpose else {}))
    if json:
        return output.as_json(found)
    output.table(
        ("id", "name", "size", "purpose", "status", "age"),
        (
            (
                f["id"],
                f["filename"],
                size(f["bytes"]),
                f["purpose"],
                output.status(f["status"]),
                output.age(f["created_at"]),
            )
            for f in found
        ),
        empty="No files yet: `tunery files upload FILE` sends one.",
    )
    return None


@app.command("show")
def show_file(context: typer.Context, file: str) -> None:
    """Show a file as JSON."""
    output.as_json(connect(context).call("GET", f"/files/{file}"))


@app.command()
def content(
    context: typer.Context,
    file: str,
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=new_file, help="Write to this file instead of the terminal."),
    ] = None,
) -> None:
    """Print or save a file's content."""
    api, path = connect(context), f"/files/{file}/content"
    if target is None:
        for chunk in api.stream(path):
            sys.stdout.buffer.write(chunk)
        return
    api.download(path, target)
    output.done(f"{target} ({size(target.stat().st_size)})")


@app.command()
def report(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(help="A local file, for which no server is needed, or the id of an uploaded one.")
    ],
    against: Annotated[str | None, typer.Option(help="A file or an id that should have no rows in common.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For a local file a folder with tokenizer.json; for an uploaded one a model.",
            show_default="an estimate",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Token limit of a row; only for a local file.")] = 2048,
    columns: ColumnNames = None,
    html: Annotated[Path | None, typer.Option(callback=new_file, help="Also write an HTML page to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Report duplicates, contradictions, leaks, wrong labels and other faults of a file's rows."""
    named = parse_columns(columns)
    if Path(file).is_file():
        said = make_report(Path(file), against, base=base, max_tokens=max_tokens, columns=named)
        name = Path(file).name
    elif file.startswith(ids.FILE):
        if against is not None and not against.startswith(ids.FILE):
            raise typer.BadParameter(
                f"--against {against}: {file} is an uploaded file, so upload this one too and pass its id."
            )
        said, name = fetch_report(connect(context), file, against=against, base=base, columns=columns), file
    else:
        raise no_such_file(file)
    if html is not None:
        html.write_text(page.render(name, said), encoding="utf-8")
    if json:
        sys.stdout.write(dumps(said, indent=1) + "\n")  # by hand: colours would take minutes on a large file
    else:
        print_report(said, name)


@app.command()
def delete(context: typer.Context, files: list[str], yes: Yes = False) -> None:
    """Delete files that no unfinished job uses."""
    delete_found(connect(context), "/files", files, named_by="filename", yes=yes)
