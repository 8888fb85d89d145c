"""`tunery ...`: the program. An error is one line on stderr and exit status 1, or 2 for wrong usage and settings.

A traceback is a bug of ours.
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tunery.cli import captures, files, jobs, keys, models, output, webhooks
from tunery.cli.advise import advise
from tunery.cli.baseline import baseline
from tunery.cli.chat import chat
from tunery.cli.client import HOME
from tunery.cli.options import ApiKey, ApiUrl, Home, stack_home
from tunery.cli.routes import as_commands
from tunery.errors import TuneryError, WrongSettings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tuning on your own machines with OpenAI's API.",
)
app.add_typer(jobs.app, name="jobs")
app.add_typer(files.app, name="files")
app.add_typer(models.app, name="models")
app.add_typer(captures.app, name="captures")
app.add_typer(webhooks.app, name="webhooks")
app.command()(advise)
app.command()(baseline)
app.command()(chat)
app.add_typer(keys.project_commands, name="projects")
app.add_typer(keys.key_commands, name="keys")

StackHome = Annotated[
    Path | None, typer.Option("--home", help="Folder of the stack's data.", show_default="that of `tunery --home`")
]


def _print_version(asked: bool) -> None:
    if asked:
        output.console.print(f"tunery {metadata.version('tunery')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")]


@app.callback()
def shared(api_url: ApiUrl = None, key: ApiKey = None, home: Home = HOME, version: Version = False) -> None:
    """What all commands share; `options.connect` reads it from the context."""


@app.command()
def up(
    context: typer.Context,
    home: StackHome = None,
    port: Annotated[int, typer.Option(help="The API's port on 127.0.0.1; 0: a free one.")] = 8000,
    model: Annotated[
        Path | None, typer.Option(help="A GGUF to register as SmolLM2-135M-Instruct.", show_default="the package's")
    ] = None,
) -> None:
    """Start all services on this machine and run them until Ctrl-C."""
    from tunery.cli import stack

    stack.up(home or stack_home(context), port=port, gguf=model)


@app.command()
def down(context: typer.Context, home: StackHome = None) -> None:
    """Stop the services that `tunery up` started."""
    from tunery.cli import stack

    stack.down(home or stack_home(context))


@app.command()
def demo(
    rows: Annotated[int, typer.Option(help="Training rows.")] = 320,
    test_rows: Annotated[int, typer.Option(help="Number of held-out rows to score.")] = 100,
    base: Annotated[
        str, typer.Option(help="smollm2, or gemma3 after `make demo BASE=gemma3` has downloaded it.")
    ] = "smollm2",
) -> None:
    """Fine-tune a real model on real data, and verify that it has improved."""
    from tunery.local import bases
    from tunery.local import demo as story

    raise typer.Exit(story.run(bases.named(base), rows=rows, test_rows=test_rows))


def run() -> None:
    """The console script."""
    try:
        app()
    except TuneryError as error:
        _tell(as_commands(error.message))
        sys.exit(2 if isinstance(error, WrongSettings) else 1)
    except OSError as error:  # of a path that the user named
        _tell(_of_path(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _of_path(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}." if error.filename else str(error)


def _tell(error: str) -> None:
    output.errors.print(Text.assemble(("Error: ", "red"), error), soft_wrap=True)


if __name__ == "__main__":
    run()
