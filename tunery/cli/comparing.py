"""Answers of several models side by side, in the terminal."""

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunery.cli import output
from tunery.cli.client import ApiClient

NARROW = 30
"""Columns of text below which answers stand one under the other."""


def compare(api: ApiClient, question: str, body: dict[str, Any]) -> None:
    """Asks every model and prints the question and the answers."""
    found = api.call("POST", "/models/compare", json={**body, "prompts": [question]}, timeout=None)
    output.console.print(draw(question, found["data"][0], width=output.console.width))


def draw(question: str, compared: dict[str, Any], *, width: int) -> RenderableType:
    """Returns the question, and below it a column for each answer, or where the terminal is narrow a block."""
    answers = compared["answers"]
    lay_out = _columns if width // len(answers) >= NARROW else _blocks
    same = [Text("The answers are the same.", style="dim")] if compared["same"] else []
    return Group(Text(f"> {question}", style="bold"), lay_out(answers), *same)


def _columns(answers: list[dict[str, Any]]) -> RenderableType:
    table = Table(box=box.MINIMAL, expand=True, pad_edge=False, header_style="cyan")
    for answer in answers:
        # Folded, not cut: an id is there to be copied, and a long word of an answer to be read.
        table.add_column(answer["model"], ratio=1, overflow="fold")
    table.add_row(*(_text(answer) for answer in answers))
    table.add_row(*(_counts(answer) for answer in answers))
    return table


def _blocks(answers: list[dict[str, Any]]) -> RenderableType:
    parts = [Group(Text(answer["model"], style="cyan"), _text(answer), _counts(answer), "") for answer in answers]
    return Group(*parts)


def _text(answer: dict[str, Any]) -> Text:
    said = answer["content"]
    return Text(said, overflow="fold") if said else Text("(no text)", style="dim")


def _counts(answer: dict[str, Any]) -> Text:
    cut = ", cut by the token limit" if answer["finish_reason"] == "length" else ""
    return Text(f"{output.counted(answer['completion_tokens'], 'token')}{cut}", style="dim")
