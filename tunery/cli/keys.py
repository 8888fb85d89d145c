"""`tunery projects ...` and `tunery keys ...`: on the database itself, as no key can exist before the first."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.text import Text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from tunery import db, processes
from tunery.cli import output
from tunery.cli.client import Refused
from tunery.cli.options import Yes, confirm, stack_home
from tunery.errors import NotFound, NotMigrated, TuneryError
from tunery.keys import auth, projects
from tunery.keys.model import Key
from tunery.keys.model import Project as ProjectRow
from tunery.local import state
from tunery.retention import projects as erasure
from tunery.settings import get_settings
from tunery.storage import open_storage

project_commands = typer.Typer(
    no_args_is_help=True, help="Projects, which own files, jobs and models (needs the database)."
)
key_commands = typer.Typer(no_args_is_help=True, help="API keys, each for one project (needs the database).")

_CAPS = ("max_running", "max_queued", "requests_per_minute", "tokens_per_minute")
_MOST = 2**31 - 1
"""The largest number of their columns."""
_NUMBER = "N|none"
MaxRunning = Annotated[
    str | None, typer.Option(metavar=_NUMBER, help="Maximum number of jobs that run at a time.", show_default=False)
]
MaxQueued = Annotated[
    str | None, typer.Option(metavar=_NUMBER, help="Maximum number of waiting jobs.", show_default=False)
]
RequestsPerMinute = Annotated[
    str | None,
    typer.Option(metavar=_NUMBER, help="Requests to models per minute; none: the settings'.", show_default=False),
]
TokensPerMinute = Annotated[
    str | None,
    typer.Option(
        metavar=_NUMBER, help="Tokens of prompts and answers per minute; none: the settings'.", show_default=False
    ),
]
Project = Annotated[str, typer.Option("--project", "-p", help="A project's name or id.")]


class NoDatabase(TuneryError):
    """The database at {url} cannot be used: {reason} Set TUNERY_DATABASE_URL, or run this command while `tunery up` is
    running."""

    code = "no_database"


@contextmanager
def _transaction(context: typer.Context) -> Iterator[Session]:
    """Opens a transaction on TUNERY_DATABASE_URL, else on the stack that runs in --home."""
    local = state.running(stack_home(context))
    if "TUNERY_DATABASE_URL" not in os.environ and local:
        os.environ["TUNERY_DATABASE_URL"] = local["database_url"]
        os.environ["TUNERY_STORAGE_URL"] = local.get("storage_url", get_settings().storage_url)
        get_settings.cache_clear()
    try:
        with db.transaction() as session:
            yield session
    except NotFound as error:
        # The error's own words are for requests, which live inside a project.
        raise Refused(message=f"There is no {error.fields['kind']} '{error.fields['id']}'.") from error
    except OperationalError as error:
        raise NoDatabase(url=_shown_url(), reason=f"{db.reason_of(error)}.") from error
    except NotMigrated as error:
        raise NoDatabase(url=_shown_url(), reason="it has not been migrated (`alembic upgrade head`).") from error


def _shown_url() -> str:
    from sqlalchemy.engine import make_url

    return make_url(get_settings().database_url).render_as_string(hide_password=True)


@project_commands.command("create")
def create_project(
    context: typer.Context,
    name: str,
    max_running: MaxRunning = None,
    max_queued: MaxQueued = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
) -> None:
    """Create a project and its first key."""
    limits = _limits(max_running, max_queued, requests_per_minute, tokens_per_minute)
    with _transaction(context) as session:
        project = projects.create_project(session, name, **limits)
        _, secret = auth.create_key(session, project, "first key")
    output.done(f"project {name} ({project.id}); its first key, shown only once:")
    output.console.print(secret, soft_wrap=True)


@project_commands.command("limit")
def limit_project(
    context: typer.Context,
    name: str,
    max_running: MaxRunning = None,
    max_queued: MaxQueued = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
) -> None:
    """Change a project's limits: those that are given, `none` to remove one. Without any, show them."""
    limits = _limits(max_running, max_queued, requests_per_minute, tokens_per_minute)
    with _transaction(context) as session:
        project = projects.find_project(session, name)
        projects.set_limits(session, project, **limits)
        found = {cap: getattr(project, cap) for cap in _CAPS}
    if limits:
        output.done(f"project {name}")
    output.fields((cap.replace("_", " "), _shown_limit(cap, limit)) for cap, limit in found.items())


def _limits(*given: str | None) -> dict[str, int | None]:
    """Returns the limits that were given, by column, in the order of _CAPS. Raises BadParameter."""
    return {cap: _read_limit(cap, text) for cap, text in zip(_CAPS, given, strict=True) if text is not None}


def _read_limit(cap: str, text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > _MOST:
        option = f"--{cap.replace('_', '-')}"
        raise typer.BadParameter(f"{option} {text}: give a whole number from 0 to {_MOST}, or none for no limit.")
    return int(text)


def _shown_limit(cap: str, limit: int | None) -> str:
    if limit is not None:
        return str(limit)
    return "the settings'" if cap.endswith("per_minute") else "none"


@project_commands.command("list")
def list_projects(context: typer.Context) -> None:
    """List all projects."""
    with _transaction(context) as session:
        found = projects.list_projects(session)
    output.table(
        ("id", "name", *(name.replace("_", " ") for name in _CAPS), "status", "age"),
        (
            (
                p.id,
                p.name,
                *(getattr(p, cap) for cap in _CAPS),
                _status(p),
                output.age(p.created_at),
            )
            for p in found
        ),
        empty="No projects yet: `tunery projects create NAME` makes one.",
    )


@project_commands.command("revoke")
def revoke_project(context: typer.Context, name: str, yes: Yes = False) -> None:
    """Revoke all keys of a project at once. Its files, jobs and models are kept."""
    with _transaction(context) as session:
        project = projects.find_project(session, name)
        named = f"{project.name} ({project.id})"
    confirm(f"Permanently revoke all keys of the project {named}?", yes=yes, undone="revoked")
    with _transaction(context) as session:
        projects.revoke_project(session, projects.find_project(session, name))
    output.done(f"project {name} revoked")


@project_commands.command("erase")
def erase_project(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The project's name or id; revoked projects too.")],
    yes: Yes = False,
) -> None:
    """Delete a project permanently: its files, models, jobs, keys and webhooks, and their stored objects."""
    with _transaction(context) as session:
        project = erasure.find(session, name)
        counts = erasure.contents(session, project.id)
        storage = open_storage(get_settings())
        erasure.check_storage(session, storage, project.id)
    output.table(("what", "rows"), counts.items(), empty="Nothing")
    confirm(f"Permanently delete all of this, and every object of {project.name} ({project.id})?", yes=yes)
    with _transaction(context) as session:
        erasure.close(session, erasure.find(session, project.id))
    processes.wait_until(lambda: _has_ended(context, project.id), seconds=60, alive=lambda: True, every=1)
    with _transaction(context) as session:
        rows = sum(erasure.contents(session, project.id).values())
    with _transaction(context):
        objects = erasure.erase(storage, project.id)
    removed = f"{output.counted(rows, 'row')} and {output.counted(objects, 'object')} removed"
    output.done(f"project {project.name} ({project.id}) erased: {removed}")


def _has_ended(context: typer.Context, project_id: str) -> bool:
    """Whether the workers have let go of the project's cancelled jobs."""
    with _transaction(context) as session:
        return erasure.live_attempts(session, project_id) == 0


@key_commands.command("create")
def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A name for people.")] = "key",
    project: Project = "default",
    admin: Annotated[bool, typer.Option("--admin", help="Allow registering base models.")] = False,
) -> None:
    """Create a key, which is shown only once."""
    with _transaction(context) as session:
        _, secret = auth.create_key(session, projects.find_project(session, project), name, admin=admin)
    output.errors.print("Shown only once:", style="dim")
    output.console.print(secret, soft_wrap=True)


@key_commands.command("list")
def list_keys(context: typer.Context, project: Project = "default") -> None:
    """List a project's keys."""
    with _transaction(context) as session:
        found = auth.list_keys(session, projects.find_project(session, project))
    output.table(
        ("id", "name", "begins with", "admin", "last used", "status", "age"),
        (
            (
                key.id,
                key.name,
                f"{key.prefix}...",
                "yes" if key.admin else "",
                output.age(key.last_used_at),
                _status(key),
                output.age(key.created_at),
            )
            for key in found
        ),
        empty="No keys: `tunery keys create` makes one.",
    )


@key_commands.command("revoke")
def revoke_key(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="The key's id (key_...), not the key itself.")],
    yes: Yes = False,
) -> None:
    """Revoke a key with immediate effect."""
    with _transaction(context) as session:
        found = auth.find_key(session, key)
        named = (
            f"'{found.name}' ({found.prefix}...) of the project {session.get_one(ProjectRow, found.project_id).name}"
        )
    confirm(f"Permanently revoke the key {named}?", yes=yes, undone="revoked")
    with _transaction(context) as session:
        auth.revoke_key(session, key)
    output.done(f"{key} revoked")


def _status(row: Key | ProjectRow) -> Text:
    return output.status("revoked" if row.revoked_at else "active")
