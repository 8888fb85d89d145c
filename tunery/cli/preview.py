"""`tunery files preview`: each token of a file's first rows, trained, masked or cut."""

from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from tunery.cli import output
from tunery.cli.client import ApiClient, Refused
from tunery.cli.options import parse_columns
from tunery.failures import JobFailure
from tunery.rows import preview, preview_page, readers
from tunery.rows.encoding import encoder_of_any
from tunery.rows.errors import CannotRender
from tunery.rows.preview_model import Preview, PreviewRow, Sequence, State
from tunery.rows.template import ChatTemplate
from tunery.spec import LossOn

_STYLES: dict[State, str] = {"trained": "bold green", "masked": "dim", "cut": "strike red"}
_MARKS: dict[State, tuple[str, str]] = {"trained": ("⟦", "⟧"), "masked": ("", ""), "cut": ("~", "~")}
"""What stands around a stretch of tokens where there are no colours."""


def make(path: Path, base: Path, *, rows: int, max_tokens: int, loss_on: LossOn, columns: str | None = None) -> Preview:
    """Returns the preview of a file here, by the tokenizer and template in the folder `base`. Raises Refused."""
    encoder = encoder_of_any(loss_on, parse_columns(columns))
    try:
        template = ChatTemplate.load(base)
        return preview.make(
            readers.chunks_of(path), template, encoder, model=base.resolve().name, rows=rows, max_tokens=max_tokens
        )
    except (JobFailure, CannotRender) as error:
        raise Refused(message=f"{path}: {error.fields.get('reason') or error.message}") from error


def fetch(api: ApiClient, file: str, **query: Any) -> Preview:
    """Returns the server's preview of a file there."""
    return Preview.model_validate(api.call("GET", f"/files/{file}/preview", params=query))


def print_preview(made: Preview) -> None:
    """Prints every row and the checks. Without colours ⟦…⟧ stand around what is learned and ~…~ around what is cut."""
    if made.shape:
        output.console.print(Text(f"{made.shape}; cut at {made.max_tokens:,} tokens", style="dim"), soft_wrap=True)
    for row in made.rows:
        output.console.print(_title(row), soft_wrap=True)
        for sequence in row.sequences:
            output.console.print(_tokens(sequence), soft_wrap=True)
    for check in made.checks:
        sign = Text("✓ ", style="green") if check.passed else Text("✗ ", style="red")
        failed = "" if check.passed else f": not in {made.where(check)}. {check.advice}"
        output.console.print(sign + Text(check.what + failed), soft_wrap=True)


def write_page(made: Preview, name: str, path: Path) -> None:
    """Writes the page with coloured tokens."""
    path.write_text(preview_page.draw(made, name), encoding="utf-8")


def _title(row: PreviewRow) -> Text:
    counts = ", then ".join(
        f"{sequence.trained} trained, {sequence.masked} masked, {sequence.cut} cut" for sequence in row.sequences
    )
    return Text.assemble("\n", (row.name.capitalize(), "bold"), "  ", row.error or counts)


def _tokens(sequence: Sequence) -> Text:
    plain = output.console.no_color or output.console.color_system is None
    shown = Text()
    for state, tokens in groupby(sequence.tokens, key=lambda token: token.state):
        text = "".join(preview_page.visible(token.text) if token.text else "" for token in tokens)
        before, after = _MARKS[state] if plain else ("", "")
        shown.append(before + text + after, style=_STYLES[state])
    if sequence.omitted:
        shown.append(f" … and {sequence.omitted:,} more tokens")
    return shown
