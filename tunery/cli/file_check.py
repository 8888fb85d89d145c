"""What `tunery files check` prints of a file, as the job's validation would judge it without a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

import typer

from tunery.cli import show
from tunery.datasets import rules
from tunery.failures import JobFailure
from tunery.rows import readers
from tunery.rows.encoding import CHATS_OR_PAIRS
from tunery.rows.errors import InvalidRows
from tunery.rows.messages import FileRole

_ANY_LENGTH = 2**20


def check(path: Path, role: str) -> bool:
    """Prints what a file holds; whether a job could take it."""
    if role not in get_args(FileRole):
        raise typer.BadParameter(f"--role {role}: use {', '.join(get_args(FileRole))}.")
    try:
        kind = readers.identify(_chunks(path))
        summary = rules.check_examples(_chunks(path), role=cast(FileRole, role), encoder=CHATS_OR_PAIRS)
    except InvalidRows as error:
        return _refuse(path, error.message)
    except JobFailure as error:
        return _refuse(path, str(error.fields.get("reason") or error.message))
    shape = summary.shape.describe() or f"{summary.shape.name} rows"
    show.console.print(f"{path}: {kind}; {shape}; {summary.examples} examples", soft_wrap=True, markup=False)
    for warning in summary.warnings(_ANY_LENGTH)[summary.shape.describe() is not None :]:
        show.errors.print(f"{path}: {warning}", soft_wrap=True, markup=False)
    return True


def _refuse(path: Path, reason: str) -> bool:
    show.errors.print(f"{path}: {reason}", soft_wrap=True, markup=False)
    return False


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            yield chunk
