"""`tunery up` and `tunery down`: start and stop a local stack."""

import os
import signal
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text
from sqlalchemy import delete

from tunery import db, processes
from tunery.cli import models as model_commands
from tunery.cli.client import ApiClient
from tunery.errors import TuneryError
from tunery.keys import auth, projects
from tunery.keys.model import Key
from tunery.local import lock
from tunery.local.bases import SMOLLM2, NoModel
from tunery.local.paths import LOOPBACK
from tunery.local.signals import ends_on_signals, undisturbed
from tunery.local.stack import Stack
from tunery.local.terminal import Reporter, literal_console
from tunery.models.model import Model


def up(home: Path, *, port: int, gguf: Path | None) -> None:
    """Runs until Ctrl-C or SIGTERM. Raises TuneryError when a service does not start, or ends again and again."""
    console = literal_console()
    allow = os.environ.get("TUNERY_WEBHOOK_ALLOW", LOOPBACK)
    stack = Stack(home, port=port, environment={"TUNERY_WEBHOOK_ALLOW": allow}, report=Reporter(console))
    with ends_on_signals():
        try:
            stack.start()
            _show_key(stack, console)
            register(stack, gguf, console)
            _welcome(stack, console)
            _supervise(stack, console)
        except KeyboardInterrupt:
            console.print("\nStopping; a running job is saved and continues with the next `tunery up`.", style="dim")
        finally:
            with undisturbed():
                stack.stop()
    console.print("Everything is stopped.", style="dim")


def _supervise(stack: Stack, console: Console) -> NoReturn:
    stack.report = Reporter(console, timed=False)  # restarts are not steps of the start, and may be days apart
    while True:
        stack.restart_dead()
        time.sleep(1)


def register(stack: Stack, gguf: Path | None, console: Console) -> None:
    """Registers SmolLM2 through the API, where it is missing; waits for one that an interrupted start left."""
    engine = db.make_engine(stack.postgres.url())
    try:
        sessions = db.make_sessions(engine)
        with sessions.begin() as session:
            there = session.get(Model, SMOLLM2.id)
            if there is not None and there.status != "processing":
                return
            project = projects.list_projects(session)[0]
            key, secret = auth.create_key(session, project, "tunery up", admin=True)
        try:
            api = ApiClient(stack.api_url, secret)
            add_base(api, None if there else gguf or SMOLLM2.gguf(), console)
        finally:
            with sessions.begin() as session:
                session.execute(delete(Key).where(Key.id == key.id))
    except NoModel as missing:
        said = f"{missing.message} Or name a file with --model."
        console.print(Text.assemble(("  ! ", "yellow"), said), soft_wrap=True)
    finally:
        engine.dispose()


def add_base(api: ApiClient, gguf: Path | None, console: Console) -> None:
    """Adds SmolLM2 and waits until it is ready. `gguf` None: it was registered before."""
    report = Reporter(console)
    with console.status(f"a worker converts {SMOLLM2.id}"):
        if gguf is not None:
            model_commands.add_base(api, SMOLLM2.id, str(gguf))
        model_commands.wait_until_ready(api, SMOLLM2.id)  # minutes on a busy machine
    report("Base model", SMOLLM2.id)


def _show_key(stack: Stack, console: Console) -> None:
    """Prints the first key at once: it cannot be shown again, and the next steps may fail or be stopped."""
    if not stack.first_key:
        console.print("\nThe first key was shown earlier; `tunery keys create` makes another.\n")
        return
    console.print("\nThe first key (an administrator's), shown only once:\n")
    console.print(f"  export TUNERY_API_KEY={stack.first_key} TUNERY_API_URL={stack.api_url}", soft_wrap=True)
    console.print(f"  export OPENAI_BASE_URL={stack.api_url}/v1 OPENAI_API_KEY=$TUNERY_API_KEY\n", soft_wrap=True)


def _welcome(stack: Stack, console: Console) -> None:
    console.print(
        Text.assemble(
            ("Tunery is up.", "bold"),
            " OpenAI's API at ",
            (f"{stack.api_url}/v1", "bold"),
            f", its docs at {stack.api_url}/docs",
        ),
        soft_wrap=True,
    )
    console.print(f"Logs and data: {stack.home}. Ctrl-C stops everything.", style="dim", soft_wrap=True)


def down(home: Path) -> None:
    """Stops the owner of `home` and waits for its end."""
    console = literal_console()
    owner = lock.owner(home)
    if owner is None:
        console.print(f"No stack runs in {home}.", style="dim")
        return
    os.kill(owner, signal.SIGTERM)
    with console.status("stopping; a running job is saved"):
        gone = processes.wait_until(lambda: not lock.is_held(home), seconds=180, alive=lambda: True)
    if not gone:
        raise StillRunning(home=home, pid=owner)
    console.print("Everything is stopped.", style="dim")


class StillRunning(TuneryError):
    """The stack in {home} (process {pid}) has not stopped within three minutes. Its logs are in {home}/logs."""

    code = "still_running"
