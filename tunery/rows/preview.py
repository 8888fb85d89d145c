"""Previews what a model learns from a file's first rows, token by token, and checks the labels.

Ids and labels are those of the rows' encoder, through which the trainer reads: no label is decided here.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from tokenizers.decoders import DecodeStream

from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import RowEncoder, read_rows
from tunery.rows.formats import SourceRow
from tunery.rows.messages import FileRole
from tunery.rows.preview_checks import Checker, Marked
from tunery.rows.preview_model import Preview, PreviewRow, Sequence, State, Token
from tunery.rows.shapes import FileShape
from tunery.rows.template import IGNORED, ChatTemplate

MOST_ROWS = 20
MOST_SHOWN = 4096
"""Maximum shown tokens of a sequence; all are counted and checked."""
MOST_CHARACTERS = 2**20
"""Maximum characters of a row's source. A longer one would take seconds to tokenise, and nobody would read it."""
_UNCUT = 2**31


def make(
    chunks: Iterable[bytes],
    template: ChatTemplate,
    encoder: RowEncoder,
    *,
    model: str,
    rows: int = 3,
    max_tokens: int = 2048,
    role: FileRole = "training",
) -> Preview:
    """Returns the preview of a file's first rows, cut at `max_tokens`; reads only those rows.

    Raises InvalidTrainingFile if the bytes are not rows.
    """
    shape, checker = FileShape(encoder.columns), Checker(template)
    shown = [
        _preview_row(source, template, encoder, checker, max_tokens, role)
        for source in islice(read_rows(chunks, role, shape), min(rows, MOST_ROWS))
    ]
    checks = checker.verdicts()
    return Preview(
        model=model,
        chat_template_sha256=template.sha256,
        max_tokens=max_tokens,
        shape=shape.describe() or shape.name,
        rows=shown,
        checks=checks,
        passed=all(check.passed for check in checks),
    )


def _preview_row(
    source: SourceRow, template: ChatTemplate, encoder: RowEncoder, checker: Checker, max_tokens: int, role: FileRole
) -> PreviewRow:
    failed: set[str] = set()
    try:
        _check_length(source, role)
        example = encoder.parse(source, role)
        encoded = encoder.encode(template, example, source.name, max_length=_UNCUT, role=role)
    except InvalidTrainingFile as error:
        checker.refuse(source.number)
        reason = str(error.fields["reason"])
        return _shown(source, error=reason, failed=["rows_are_read"])
    failed |= checker.check_roles(source.number, example)
    ends_unlearned = example.messages[-1].role == "assistant" and not example.messages[-1].is_trained
    marked = [Marked(rendered.input_ids, rendered.labels, max_tokens, ends_unlearned) for rendered in encoded.sequences]
    for sequence in marked:
        failed |= checker.check_sequence(source.number, sequence)
    sequences = [describe(template, sequence) for sequence in marked]
    return _shown(source, sequences=sequences, failed=sorted(failed))


def _shown(source: SourceRow, **found: Any) -> PreviewRow:
    return PreviewRow(number=source.number, line=source.line, name=source.name, **found)


def _check_length(source: SourceRow, role: FileRole) -> None:
    fields = source.fields or {}
    if sum(len(str(value)) for value in fields.values()) > MOST_CHARACTERS:
        reason = f"{source.name.capitalize()} is longer than {MOST_CHARACTERS:,} characters, too long for a preview."
        raise InvalidTrainingFile(param=f"{role}_file", role=role, reason=reason)


def describe(template: ChatTemplate, marked: Marked) -> Sequence:
    """Returns a sequence's tokens with their texts, and the number of tokens in each state."""
    states = list(_states(marked))
    shown = marked.input_ids[:MOST_SHOWN]
    texts = _texts(template, shown)
    tokens = [Token(id=id, text=text, state=state) for id, text, state in zip(shown, texts, states, strict=False)]
    return Sequence(
        tokens=tokens,
        trained=states.count("trained"),
        masked=states.count("masked"),
        cut=states.count("cut"),
        omitted=len(states) - len(tokens),
    )


def _states(marked: Marked) -> Iterator[State]:
    for place, label in enumerate(marked.labels):
        if place >= marked.max_tokens:
            yield "cut"
        else:  # the first token is never learned, as nothing precedes it
            yield "masked" if label == IGNORED or place == 0 else "trained"


def _texts(template: ChatTemplate, ids: list[int]) -> Iterator[str]:
    """Yields each token's text. A character of several tokens is the text of the last; the others have none."""
    stream = DecodeStream(skip_special_tokens=False)
    for id in ids:
        try:
            yield stream.step(template.tokenizer, id) or ""
        except Exception:  # noqa: BLE001  (the library's own class is that of all errors) bytes that are no character
            stream = DecodeStream(skip_special_tokens=False)
            yield template.tokenizer.decode([id], skip_special_tokens=False)
