"""Options that several commands share, and their values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tunery.cli import client, output
from tunery.datasets import columns
from tunery.errors import InvalidValue
from tunery.spec import Columns

ApiUrl = Annotated[
    str | None,
    typer.Option("--api-url", envvar="TUNERY_API_URL", help="The API's URL.", show_default="the stack that runs here"),
]
ApiKey = Annotated[
    str | None, typer.Option("--key", envvar="TUNERY_API_KEY", help="A project's API key.", show_envvar=True)
]
Home = Annotated[Path, typer.Option(help="The local stack that commands use by default.")]
ColumnNames = Annotated[
    str | None,
    typer.Option(help="Columns with other names, such as prompt=Frage,completion=Antwort.", show_default="by name"),
]
Limit = Annotated[int, typer.Option(min=1, help="Maximum number of entries.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]


def connect(context: typer.Context) -> client.ApiClient:
    """Returns a client of the API that the options of `tunery` name."""
    given = context.find_root().params
    return client.connect(given.get("api_url"), given.get("key"), stack_home(context))


def stack_home(context: typer.Context) -> Path:
    """Returns the home of the stack that `tunery --home` names."""
    return Path(context.find_root().params.get("home") or client.HOME)


def new_file(path: Path | None) -> Path | None:
    """Returns the path of a file that a command will write. Raises BadParameter where that cannot be, before any work.

    It is the callback of every option that names such a file.
    """
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist. Create it, or name a file in another one.")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Name a file in it.")
    return path


def parse_columns(text: str | None) -> Columns | None:
    """Returns the columns that `--columns` names. Raises BadParameter."""
    try:
        return None if text is None else columns.parse(text)
    except InvalidValue as error:
        raise typer.BadParameter(f"--columns: {error.message}") from None


def confirm(question: str, *, yes: bool, undone: str = "deleted") -> None:
    """Asks before something is deleted, or another thing that is `undone`, unless `yes`. Ends the command if the answer
    is no.

    Raises Refused where nobody can answer.
    """
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        output.errors.print()  # ends the line of the question
        raise client.Refused(
            message=f"Nothing was {undone}, as nobody confirmed it. Pass --yes to skip the question."
        ) from None
    if not agreed:
        raise typer.Abort


def delete_found(api: client.ApiClient, folder: str, ids: Sequence[str], *, named_by: str, yes: bool) -> None:
    """Deletes objects of one route, as `delete_each` does, if all exist. Their field `named_by` is what a person knows.

    Raises Refused before anything is deleted if one does not exist.
    """
    routes = {id: f"{folder}/{id}" for id in ids}
    named = [f"{api.call('GET', route)[named_by]} ({id})" for id, route in routes.items()]
    delete_each(api, routes, ", ".join(named), yes=yes)


def delete_each(api: client.ApiClient, routes: Mapping[str, str], named: str, *, yes: bool) -> None:
    """Deletes objects, given by id with their routes, after one question in which they are `named`; prints each."""
    confirm(f"Permanently delete {named}?", yes=yes)
    for id, route in routes.items():
        api.call("DELETE", route)
        output.done(f"{id} deleted")
