"""What `tunery files check` prints of a file, as the job's validation would judge it without a model."""

from pathlib import Path
from typing import cast, get_args

import typer

from tunery.cli import output
from tunery.datasets.report import verdict
from tunery.datasets.report.verdict import Verdict
from tunery.rows import readers
from tunery.rows.messages import FileRole
from tunery.spec import Columns, named_columns


def judge(path: Path, role: str, columns: Columns | None = None) -> Verdict:
    """Returns what a file holds, and whether a job could take it."""
    if role not in get_args(FileRole):
        raise typer.BadParameter(f"--role {role}: use {', '.join(get_args(FileRole))}.")
    return verdict.judge(lambda: readers.chunks_of(path), role=cast(FileRole, role), columns=named_columns(columns))


def print_verdict(path: Path, found: Verdict) -> None:
    """A line on the file, and one for each warning."""
    if found.reason is not None:
        output.errors.print(f"{path}: {found.reason}", soft_wrap=True)
        return
    said = f"{path}: {found.format}; {found.shape}; {output.counted(found.examples, 'example')}"
    output.console.print(said, soft_wrap=True)
    for warning in found.warnings:
        output.errors.print(f"{path}: {warning}", soft_wrap=True)
