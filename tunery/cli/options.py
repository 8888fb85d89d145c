"""Options that several commands share, and what they come to."""

from pathlib import Path
from typing import Annotated

import typer

from tunery.cli import remote

ApiUrl = Annotated[
    str | None,
    typer.Option(
        "--api-url", envvar="TUNERY_API_URL", help="Where the API is.", show_default="the stack that runs here"
    ),
]
ApiKey = Annotated[
    str | None, typer.Option("--key", envvar="TUNERY_API_KEY", help="A project's key.", show_envvar=True)
]
Home = Annotated[Path, typer.Option(help="The local stack that commands talk to by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]


def connect(context: typer.Context) -> remote.Remote:
    """What the options of `tunery` itself, or of the command's group, say about the API."""
    given = context.find_root().params
    return remote.connect(given.get("api_url"), given.get("key"), stack_home(context))


def stack_home(context: typer.Context) -> Path:
    """The stack that a command is about: `tunery --home`, inherited by all."""
    return Path(context.find_root().params.get("home") or remote.HOME)
