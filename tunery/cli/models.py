"""`tunery models ...`"""

import enum
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tunery.cli import adapters, downloads, output, summary
from tunery.cli.client import ApiClient, Refused
from tunery.cli.options import AsJson, ColumnNames, Yes, connect, delete_each, parse_columns
from tunery.local.terminal import size
from tunery.models.errors import ModelWithheld
from tunery.planning import engines
from tunery.spec import Columns, named_columns

app = typer.Typer(no_args_is_help=True, help="Base models, tuned models and aliases.")

WithBase = Annotated[
    bool, typer.Option("--with-base", help="Also download an adapter's base, so that plain PEFT loads the folder.")
]


@app.command()
def add(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="The model's name for jobs, without '/' or ':'.")],
    source: Annotated[str, typer.Argument(help="A folder, a hub id or a GGUF file that the workers can read.")],
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file that replaces the model's own chat template.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the model is ready.")] = True,
) -> None:
    """Register a base model (administrators). A worker converts it to safetensors and stores it."""
    api = connect(context)
    model = add_base(api, id, source, chat_template)
    if wait:
        with output.waiting(f"{id}: a worker reads {source}"):
            model = wait_until_ready(api, id)
    output.done(f"{model['id']} is {model.get('status', 'registered')}")
    for technique, reason in (model.get("techniques") or {}).items():
        if reason:
            output.errors.print(f"It cannot be trained with {technique}: {reason}")


class Technique(enum.StrEnum):
    """What an adapter was trained with."""

    LORA = "lora"
    QLORA = "qlora"


@app.command("import")
def import_adapter(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="The base that it was trained on.")],
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The folder that PEFT's save_pretrained wrote.")
    ],
    suffix: Annotated[str | None, typer.Option(help="Part of the model's name.")] = None,
    technique: Annotated[
        Technique, typer.Option(help="qlora: it was trained, and is served, on the base in four bits.")
    ] = Technique.LORA,
    wait: Annotated[bool, typer.Option(help="Wait until the model is ready.")] = True,
) -> None:
    """Import a LoRA adapter that was trained elsewhere; print the new model's name."""
    api = connect(context)
    model = adapters.send(api, base, folder, suffix, technique.value)
    if wait:
        with output.waiting(f"{model['id']}: a worker checks {folder}"):
            model = wait_until_ready(api, model["id"])
    output.console.print(model["id"], soft_wrap=True)


def add_base(api: ApiClient, id: str, source: str, chat_template: Path | None = None) -> dict[str, Any]:
    # A path is made absolute, as the worker's folder is not ours; a hub id has the same looks but no such file.
    there = Path(source).expanduser()
    body = {"id": id, "source": str(there.resolve()) if there.exists() else source}
    if chat_template is not None:
        body["chat_template"] = _read_template(chat_template)
    return api.call("POST", "/models", json=body)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(message=f"The chat template {path} cannot be read: {error}") from error


def wait_until_ready(api: ApiClient, id: str, *, seconds: float = 3600) -> dict[str, Any]:
    """Raises Refused when the model ends in an error or takes too long."""
    deadline = time.monotonic() + seconds
    while True:
        model = api.call("GET", downloads.model_route(id))
        if model.get("status") == "error":
            raise Refused(message=f"{id} could not be added: {model.get('status_details') or 'see the worker log'}")
        if model.get("status") != "processing":
            return model
        if time.monotonic() > deadline:
            raise Refused(message=f"{id} is still being prepared after {seconds:.0f} s. Look at the I/O worker's log.")
        time.sleep(0.5)


@app.command("list")
def list_models(context: typer.Context, json: AsJson = False) -> None:
    """List bases and the project's own models."""
    found = connect(context).call("GET", "/models", params={"status": "any"})["data"]
    if json:
        return output.as_json(found)
    output.table(
        ("id", "kind", "owner", "status", "age"),
        (
            (m["id"], _kind(m), m["owned_by"], output.status(m.get("status") or "ready"), output.age(m["created"]))
            for m in found
        ),
        empty="No models yet: `tunery models add NAME SOURCE` registers a base.",
    )
    return None


def _kind(model: dict[str, Any]) -> str:
    is_alias = model["kind"] == "base" and model["base_model"] is not None
    return f"alias of {model['base_model']}" if is_alias else str(model["kind"])


@app.command("engines")
def list_engines(context: typer.Context, model: str) -> None:
    """Show commands that run a model elsewhere: plain PEFT or transformers, vLLM, llama.cpp, ollama."""
    for each in connect(context).call("GET", f"{downloads.model_route(model)}/engines")["data"]:
        output.note(f"# {each['engine']}" + (f": {each['files']}" if each["files"] else ""))
        output.console.print(each["command"], soft_wrap=True)


@app.command("show")
def show_model(context: typer.Context, model: str) -> None:
    """Show a model as JSON."""
    output.as_json(connect(context).call("GET", downloads.model_route(model)))


@app.command()
def download(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A base, a tuned model or a checkpoint.")],
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder.", show_default="the model's name")
    ] = None,
    with_base: WithBase = False,
) -> None:
    """Download a model's files and verify their sha256."""
    api = connect(context)
    found = api.call("GET", downloads.model_route(model))
    name = found["id"]
    folder = target or Path(name.replace(":", "_"))
    bring(api, downloads.model_route(name), downloads.model_files(api, name), folder)
    if with_base:
        bring_base(api, found["base_model"], folder)


def bring(api: ApiClient, owner: str, files: list[dict[str, Any]], folder: Path) -> None:
    """Fetches the files of the route `owner` and prints each."""
    for path, count in downloads.fetch(api, owner, files, folder):
        output.done(f"{folder / path}  {size(count)}")


def bring_base(api: ApiClient, base: str | None, folder: Path) -> None:
    """Fetches an adapter's base into its folder; a whole model has none."""
    if base is None or not downloads.is_adapter(folder):
        output.note("It is a whole model, which needs no base.")
        return
    there = folder / engines.BASE
    bring(api, downloads.model_route(base), downloads.model_files(api, base), there)
    output.done(f"{downloads.point_at_base(folder, there)} names {there} as its base")


class Format(enum.StrEnum):
    """What a model can be exported as."""

    MERGED = "merged"
    FP8 = "fp8"
    GGUF_F16 = "gguf-f16"
    GGUF_Q8_0 = "gguf-q8_0"
    GGUF_Q4_0 = "gguf-q4_0"
    GGUF_Q4_1 = "gguf-q4_1"
    ADAPTER = "adapter-gguf"


@app.command("export")
def export_model(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A tuned model or a checkpoint.")],
    format: Annotated[list[Format], typer.Option("--format", "-f", help="Repeatable.")],
    rows: Annotated[
        str | None,
        typer.Option(help="The id of a file of rows to verify a merge, instead of those of the model's job."),
    ] = None,
    columns: ColumnNames = None,
    wait: Annotated[bool, typer.Option(help="Wait until the files are ready.")] = True,
) -> None:
    """Export a model on a worker: merged, FP8 or GGUF. `tunery models download` fetches the files."""
    api = connect(context)
    route = f"{downloads.model_route(model)}/exports"
    found = api.call("POST", route, json=_asked(format, rows, parse_columns(columns)))
    if wait:
        with output.waiting(f"{model}: a worker exports it"):
            found = _wait_for_worker(api, route)
    for result in found["results"]:
        if not result["is_refused"]:
            output.done(f"{result['path']}: {result['message']}")
    if found["status"] == "failed":
        refused = [f"{each['path']}: {each['message']}" for each in found["results"] if each["is_refused"]]
        raise Refused(message="\n".join(refused) or found["error"] or "The export failed.")


def _asked(formats: list[Format], rows: str | None, columns: Columns | None) -> dict[str, Any]:
    return {
        "rows_file": rows,
        "columns": named_columns(columns) or None,
        "merged": Format.MERGED in formats,
        "gguf": [each.removeprefix("gguf-") for each in formats if each.startswith("gguf-")],
        "fp8": Format.FP8 in formats,
        "adapter_gguf": Format.ADAPTER in formats,
    }


def _wait_for_worker(api: ApiClient, route: str) -> dict[str, Any]:
    while True:
        found: dict[str, Any] = api.call("GET", route)["data"][0]
        if found["status"] != "queued":
            return found
        time.sleep(0.5)


@app.command()
def score(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="An adapter: imported, or of a job.")],
    test_file: Annotated[str, typer.Argument(help="The id of a file of rows that both models answer.")],
    max_rows: Annotated[int | None, typer.Option(help="Maximum number of rows, from the file's start.")] = None,
    general: Annotated[bool, typer.Option(help="Also score on the general benchmark.")] = True,
    unquantised: Annotated[bool, typer.Option(help="QLoRA: also score on the base in bf16.")] = False,
    columns: ColumnNames = None,
    json: AsJson = False,
) -> None:
    """Score an adapter against its base on test rows, on a worker and without training."""
    api = connect(context)
    route = f"{downloads.model_route(model)}/scorecards"
    asked: dict[str, Any] = {"test_file": test_file, "general": {"enabled": general}}
    if max_rows is not None:
        asked["max_rows"] = max_rows
    if unquantised:
        asked["unquantised"] = True
    api.call("POST", route, json={"evaluation": asked, "columns": named_columns(parse_columns(columns)) or None})
    with output.waiting(f"{model}: a worker scores it"):
        found = _wait_for_worker(api, route)
    if found["status"] == "failed":
        raise Refused(message=found["error"] or "The scoring failed.")
    output.as_json(found) if json else summary.print_scorecard(found["scorecard"])


@app.command()
def alias(context: typer.Context, alias: str, model: str) -> None:
    """Give a base another name, so that existing code runs unchanged (administrators)."""
    connect(context).call("POST", "/models/aliases", json={"alias": alias, "model": model})
    output.done(f"{alias} is {model}")


@app.command()
def delete(context: typer.Context, models: list[str], yes: Yes = False) -> None:
    """Delete tuned models; with an administrator's key also bases and aliases (without their bases)."""
    api = connect(context)
    routes = {model: downloads.model_route(model) for model in models}
    delete_each(api, routes, " and ".join(_described(api, models)), yes=yes)


def _described(api: ApiClient, models: list[str]) -> Iterator[str]:
    """Yields what each name stands for, as bases are shared by all projects. Raises Refused for one that is missing."""
    kinds = {model["id"]: _kind(model) for model in api.call("GET", "/models", params={"status": "any"})["data"]}
    for model in models:
        kind = kinds.get(model) or _unlisted(api, model)
        yield f"the base {model}, which all projects share" if kind == "base" else f"{model} ({kind})"


def _unlisted(api: ApiClient, model: str) -> str:
    """Returns the kind of a model that the list leaves out, as a withheld one. Raises Refused if there is none."""
    try:
        return _kind(api.call("GET", downloads.model_route(model)))
    except Refused as error:
        if error.of_api != ModelWithheld.code:
            raise
    return "withheld"
