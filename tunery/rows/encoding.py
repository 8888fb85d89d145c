"""Turns a file's bytes into token ids and labels: the path that validation, overlap check and trainer share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from tunery.failures import InvalidTrainingFile
from tunery.rows import jsonl, pairs, readers
from tunery.rows.errors import CannotRender, InvalidRows
from tunery.rows.formats import SourceRow
from tunery.rows.messages import Example, FileRole, PlainText, invalid, parse_row
from tunery.rows.pairs import PairShape
from tunery.rows.preferences import Pair, parse_pair
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate, Rendered
from tunery.spec import Columns, CutAnswers, LossOn, MethodOptions, Supervised


class Encoded(NamedTuple):
    """An encoded row: the sequences of each example that is drawn from it; empty if the cut leaves nothing to learn."""

    examples: list[list[Rendered]]
    truncated: bool
    spelled_special: tuple[str, ...] = ()
    """Special tokens that occur in the example's texts."""
    left_out: bool = False
    """Whether an example is left out because the cut takes a part of an answer."""

    @property
    def sequences(self) -> list[Rendered]:
        return [sequence for example in self.examples for sequence in example]

    @property
    def tokens(self) -> int:
        return sum(len(sequence.input_ids) for sequence in self.sequences)

    @property
    def trained_tokens(self) -> int:
        return sum(sequence.trained_tokens for sequence in self.sequences)

    @property
    def longest(self) -> int:
        return max((len(sequence.input_ids) for sequence in self.sequences), default=0)


def read_rows(chunks: Iterable[bytes], role: FileRole, shape: FileShape | None = None) -> Iterator[SourceRow]:
    """Yields a file's rows as written there, which share `shape`. Raises InvalidTrainingFile where the bytes are not
    rows."""
    return map(jsonl.parse, split_rows(chunks, role, shape))


def split_rows(chunks: Iterable[bytes], role: FileRole, shape: FileShape | None = None) -> Iterator[SourceRow]:
    """Yields what `read_rows` does, rows of JSON not parsed yet."""
    shape = shape or FileShape()
    try:
        for row in readers.split(chunks):
            yield row._replace(shape=shape)
    except InvalidRows as error:
        raise InvalidTrainingFile(param=f"{role}_file", role=role, reason=error.message) from error


def read_examples(chunks: Iterable[bytes], role: FileRole) -> Iterator[tuple[str, Example]]:
    """Yields a file's examples with the names of their rows. Raises InvalidTrainingFile."""
    for row in read_rows(chunks, role):
        yield row.name, parse_row(row, role)


def encode_example(
    template: ChatTemplate,
    example: Example,
    name: str,
    *,
    max_length: int,
    role: FileRole = "training",
    loss_on: LossOn = "assistant",
) -> Encoded:
    """Encodes one row: an example of one sequence, or one for each answer if the template renders earlier answers
    differently. `name`: see `SourceRow`. Raises InvalidTrainingFile, naming the row."""
    try:
        if isinstance(example, PlainText):
            sequences = [template.encode_text(example.messages[0].content or "", max_length)]
        else:
            sequences = template.encode_all(example, max_length, loss_on)
    except CannotRender as error:
        raise invalid(role, name, error.message) from error
    return Encoded(
        [[sequence] for sequence in sequences if sequence.trained_tokens],
        truncated=any(sequence.truncated for sequence in sequences),
        spelled_special=sequences[0].spelled_special,
    )


def encode_pair(
    template: ChatTemplate, pair: Pair, name: str, *, max_length: int, role: FileRole = "training"
) -> Encoded:
    """Encodes an example of two sequences: the prompt with the preferred answer, and with the other one. There is none
    if the cut takes either answer, or the difference between them. Raises InvalidTrainingFile, naming the row."""
    both = [encode_example(template, chat, name, max_length=max_length, role=role) for chat in (pair, pair.rejected)]
    truncated = any(encoded.truncated for encoded in both)
    rows = [row for encoded in both for row in encoded.sequences]
    differ = len(rows) == 2 and rows[0].input_ids != rows[1].input_ids
    if not differ and not truncated:
        raise invalid(
            role,
            name,
            "The model's chat template renders both answers identically. Correct one of them, or remove the row.",
        )
    spelled = tuple(dict.fromkeys(token for encoded in both for token in encoded.spelled_special))
    return Encoded([rows] if differ else [], truncated=truncated, spelled_special=spelled)


def encode_whole(
    encode: Callable[..., Encoded], template: ChatTemplate, example: Example, name: str, **options: Any
) -> Encoded:
    """Encodes an example by `encode`, without the sequences in which the cut takes a part of an answer."""
    encoded = encode(template, example, name, **options)
    whole = [rows for rows in encoded.examples if not any(row.answer_cut for row in rows)]
    return encoded._replace(examples=whole, left_out=len(whole) < len(encoded.examples))


@dataclass(frozen=True)
class RowEncoder:
    """How a method reads a file: `parse` takes a row and its file's role, `encode` the arguments of `encode_example`.

    The parsed row is an Example or a subclass. Both raise InvalidTrainingFile, naming the row.
    """

    parse: Callable[[SourceRow, FileRole], Example]
    encode: Callable[..., Encoded]
    columns: Mapping[str, str] = field(default_factory=dict)
    """The file's column for each part, if its owner named them."""


def parse_any(source: SourceRow, role: FileRole) -> Example:
    """Returns a chat, or a Pair where the file's first row is one. Raises InvalidTrainingFile, naming the row."""
    shape = source.shape or FileShape()
    try:
        is_pair = isinstance(shape.shape or pairs.detect(shape.load(source)), PairShape)
    except ValueError:  # the chat parser's error says more
        is_pair = False
    return parse_pair(source, role) if is_pair else parse_row(source, role)


def encode_any(template: ChatTemplate, example: Example, name: str, **options: Any) -> Encoded:
    """Encodes a Pair by `encode_pair`, a chat by `encode_example`."""
    if isinstance(example, Pair):
        return encode_pair(template, example, name, **options)
    return encode_example(template, example, name, **options)


CHATS = RowEncoder(parse_row, encode_example)
PAIRS = RowEncoder(parse_pair, encode_pair)
CHATS_OR_PAIRS = RowEncoder(parse_any, encode_any)
ENCODERS: dict[str, RowEncoder] = {"supervised": CHATS, "dpo": PAIRS}
"""By method. A plug-in adds its own."""


def find_encoder(
    method: MethodOptions, role: FileRole, columns: Columns | None = None, cut_answers: CutAnswers = "keep"
) -> RowEncoder:
    """Returns the encoder of a file. Test rows are chats, which the models answer, or with `dpo` also pairs. `columns`
    apply to the task's files, not to the general rows of replay.

    `cut_answers`: what happens to training and validation rows in which the cut takes a part of an answer.
    """
    encoder = ENCODERS[method.type]
    if role == "test":
        encoder = CHATS_OR_PAIRS if method.type == "dpo" else CHATS
    elif isinstance(method, Supervised) and method.loss_on != "assistant":
        encoder = replace(CHATS, encode=partial(encode_example, loss_on=method.loss_on))
    if cut_answers != "keep" and role in ("training", "validation"):
        encoder = replace(encoder, encode=partial(encode_whole, encoder.encode))
    if columns is None or role == "replay":
        return encoder
    return replace(encoder, columns=columns.named)


def encoder_of_any(loss_on: LossOn, columns: Columns | None = None) -> RowEncoder:
    """Returns an encoder for a file without a job: for chats, and for pairs, to which `loss_on` does not apply."""
    if loss_on != "assistant":
        return find_encoder(Supervised(loss_on=loss_on), "training", columns)
    return CHATS_OR_PAIRS if columns is None else replace(CHATS_OR_PAIRS, columns=columns.named)


def encode_answer(template: ChatTemplate, example: Example, name: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a test row's prompt, and those of its reference answer, the last message, uncut.

    Raises InvalidTrainingFile, naming the row.
    """
    try:
        return template.encode_answer(example)
    except CannotRender as error:
        raise invalid("test", name, error.message) from error


def nothing_trained(role: FileRole, max_length: int) -> InvalidTrainingFile:
    """Returns the error for a file in which the cut takes every answer of every line."""
    reason = f"No example has a trained token within max_seq_length ({max_length}). Raise max_seq_length."
    return InvalidTrainingFile(param=f"{role}_file", role=role, reason=reason)
