"""Checks whether a file can be trained on, before a GPU is claimed. Its syntax was checked at the upload."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial

from tunery.failures import AnswersCut, InvalidNExamples, InvalidTrainingFile
from tunery.rows.bulk import Judged, Reading, digest_rows
from tunery.rows.dialect import LimitExceeded
from tunery.rows.encoding import CHATS, Encoded, RowEncoder, encode_answer, nothing_trained
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example, FileRole, PlainText, is_answerable
from tunery.rows.preferences import Pair
from tunery.rows.rendered import find_marker, find_speaker
from tunery.rows.shape import CHAT
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate

LEAST_EXAMPLES = 10
MOST_CUT = 0.01
"""The share of examples without a part of their answer above which a job fails, unless it says otherwise."""
_SHOWN = 5
_MOST_FAULTS = 100


@dataclass
class Summary:
    """What a good file holds. Tokens, with the template only, are those of one epoch after the cut at `max_length`.
    `truncated`: lines that lose their end to the cut, `left_out`: lines of which a sequence is left out since it loses
    a part of an answer, `unlearnable`: lines that lose every answer and are left out.
    `silent`: lines with an answer that is empty. `unscorable`: lines of a test file whose wanted answer is empty as the
    template writes it. `spelled`: lines that spell special tokens, which they keep as text. `rendered`: lines with a
    message that begins or ends with a template's marker, and the marker. `spoken`: lines with a plain text that is a
    conversation, and how it begins. `unknown_keys`: those of the rows that are read by nobody, in the order in which
    they came. `shape`: what the rows' columns become.
    `answer_tokens`: lines with the tokens of the answers that they want, of rows that a model is going to answer."""

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    unlearnable: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    unscorable: list[int] = field(default_factory=list)
    unknown_keys: dict[str, None] = field(default_factory=dict)
    spelled: dict[int, tuple[str, ...]] = field(default_factory=dict)
    rendered: dict[int, str] = field(default_factory=dict)
    spoken: dict[int, str] = field(default_factory=dict)
    with_tools: int = 0
    answer_tokens: list[tuple[int, int]] = field(default_factory=list)
    shape: FileShape = field(default_factory=FileShape, compare=False)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest reference answer."""
        return max((tokens for _, tokens in self.answer_tokens), default=0)

    def add(self, part: "Summary") -> None:
        """Adds the figures of the rows that follow in the file."""
        for name in (item.name for item in fields(self) if item.compare):
            mine, more = getattr(self, name), getattr(part, name)
            if isinstance(mine, list):
                mine.extend(more)
            elif isinstance(mine, dict):
                mine.update(more)
            else:
                setattr(self, name, max(mine, more) if name == "longest" else mine + more)

    def _silence(self) -> str:
        """Returns the warning of empty answers, which are a message only in chats."""
        is_chat = self.shape.name in (None, CHAT)
        what = (
            "assistant message that is empty or blank and calls no tool" if is_chat else "answer that is empty or blank"
        )
        advice = "Remove the message, or give it the weight 0" if is_chat else "Add the answer, or remove the row"
        return (
            f"{len(self.silent)} of {self.examples} examples have an {what}, which teaches the model to end its turn "
            f"at once: {_lines(self.silent)}. {advice}."
        )

    def check_cut_answers(self, max_length: int) -> None:
        """Raises AnswersCut where more than MOST_CUT of the examples lose a part of their answer."""
        cut = sorted({*self.left_out, *self.unlearnable})
        if len(cut) > MOST_CUT * self.examples:
            raise AnswersCut(
                param="training_file", count=len(cut), examples=self.examples, max_length=max_length, lines=_lines(cut)
            )

    def check_limit(self, limit: int) -> list[str]:
        """Warns of reference answers that are longer than the token limit of a model's answer."""
        long = [number for number, tokens in self.answer_tokens if tokens > limit]
        if not long:
            return []
        return [
            f"{len(long)} of {len(self.answer_tokens)} expected answers have more tokens than "
            f"evaluation.max_new_tokens ({limit}), so no model can answer these rows correctly: {_lines(long)}. Set it "
            f"to at least {self.longest_answer}."
        ]

    def warnings(self, max_length: int) -> list[str]:
        """Returns warnings for the job's owner."""
        found = [f"The file has {described}." for described in [self.shape.describe()] if described]
        if self.truncated:
            found.append(
                f"{len(self.truncated)} of {self.examples} examples are longer than {max_length} tokens and are "
                f"truncated, so the model does not learn where their last answer ends: {_lines(self.truncated)}. Raise "
                "max_seq_length to keep their end."
            )
        if self.left_out:
            found.append(
                f"{len(self.left_out)} of {self.examples} examples lose part of an answer to the limit of {max_length} "
                f"tokens and are left out: {_lines(self.left_out)}. Raise max_seq_length to keep them."
            )
        if self.unlearnable:
            found.append(
                f"{len(self.unlearnable)} of {self.examples} examples lose their whole answer to the limit of "
                f"{max_length} tokens and are left out: {_lines(self.unlearnable)}."
            )
        if self.silent:
            found.append(self._silence())
        if self.unknown_keys:
            found.append(f"The rows have keys that are ignored in training: {_names(list(self.unknown_keys))}.")
        if self.unscorable:
            found.append(
                f"{len(self.unscorable)} of {self.examples} test examples have an empty expected answer and are left "
                f"out of the scorecard: {_lines(self.unscorable)}."
            )
        if self.rendered:
            found.append(
                f"{len(self.rendered)} of {self.examples} examples have a message that begins or ends with a marker of "
                f"a chat template ({', '.join(sorted(set(self.rendered.values()))[:_SHOWN])}): "
                f"{_lines(list(self.rendered))}. The template of the job's model writes its own, and these would be "
                "read and learned as plain text. Remove them, and send each turn as a message of its own."
            )
        if self.spoken:
            found.append(
                f"{len(self.spoken)} of {self.examples} texts are conversations that begin with "
                f"'{next(iter(self.spoken.values()))}': {_lines(list(self.spoken))}. In plain texts, questions are "
                "learned too, and the model will be asked by its chat template, not in this form. Send them as "
                "'messages'."
            )
        # Rows with a template's markers around a message have been named, with what to do about them.
        if spelled := {line: tokens for line, tokens in self.spelled.items() if line not in self.rendered}:
            tokens = sorted({token for row in spelled.values() for token in row})
            found.append(
                f"{len(spelled)} of {self.examples} examples contain special tokens of the model as text "
                f"({', '.join(tokens[:_SHOWN])}): {_lines(list(spelled))}. They are tokenised as plain text."
            )
        return found


def check_examples(
    chunks: Iterable[bytes],
    *,
    role: FileRole = "training",
    template: ChatTemplate | None = None,
    max_length: int = 2048,
    least: int | None = None,
    encoder: RowEncoder = CHATS,
    answered: int = 0,
    overlap: "Overlap | None" = None,
) -> Summary:
    """Reads the whole file, row by row, in constant memory.

    `least`: examples that it must have (a training file 10, others 1). `encoder`: of the job's method. Without a
    template, rows are judged by their own form only. `answered`: how many rows a model is going to answer, from the
    start. `overlap` is shown each good line.
    Raises InvalidTrainingFile, with the first fault and the names of the others, or InvalidNExamples.
    """
    summary = Summary(shape=FileShape(encoder.columns))
    faults: dict[str, InvalidTrainingFile] = {}
    judge = partial(_judge, template, role, answered, overlap is not None)
    try:
        with closing(digest_rows(chunks, Reading(role, encoder, template, max_length), judge, summary.shape)) as parts:
            for part in parts:
                summary.add(part.summary)
                faults |= part.faults
                for number, digest in part.digests:
                    assert overlap is not None, "it was asked for"
                    overlap.add(role, number, digest)
                if len(faults) >= _MOST_FAULTS or part.is_last:
                    break
    except InvalidTrainingFile:
        # Lines further down cannot be read; the first fault is the same to every reader from the top.
        if not faults:
            raise
    if faults:
        raise _all_of(dict(list(faults.items())[:_MOST_FAULTS]), role)
    del summary.answer_tokens[answered:]
    _check_enough(summary, role, LEAST_EXAMPLES if least is None and role == "training" else least or 1)
    if template is not None and not summary.trained_tokens:
        raise nothing_trained(role, max_length)
    return summary


@dataclass
class _Part:
    """What is found in a group of rows. `faults`: by the rows' names. `digests`: the good rows' numbers and
    conversations. `is_last`: no further row is worth reading."""

    summary: Summary = field(default_factory=Summary)
    faults: dict[str, InvalidTrainingFile] = field(default_factory=dict)
    digests: list[tuple[int, bytes]] = field(default_factory=list)
    is_last: bool = False


def _judge(
    template: ChatTemplate | None, role: FileRole, answered: int, compared: bool, rows: Iterator[Judged]
) -> _Part:
    part = _Part()
    for row in rows:
        try:
            example = _take(part.summary, row)
            if template is not None:
                _check_answer(part.summary, row, template, example, role, answered)
            if compared:
                part.digests.append((row.number, _digest(example)))
        except InvalidTrainingFile as fault:
            part.faults[row.name] = fault
            part.is_last = len(part.faults) == _MOST_FAULTS or _is_exhausting(fault)
            if part.is_last:
                break
    return part


def _is_exhausting(fault: InvalidTrainingFile) -> bool:
    """Whether the chat template exceeded its budget: a hundred such rows would delay all other jobs."""
    error = fault.__cause__
    return isinstance(error, CannotRender) and isinstance(error.__cause__, LimitExceeded)


def _check_enough(summary: Summary, role: FileRole, least: int) -> None:
    if summary.examples < least:
        raise InvalidNExamples(param=f"{role}_file", role=role.capitalize(), n=summary.examples, least=least)
    if len(summary.unscorable) == summary.examples:
        raise InvalidTrainingFile(
            param=f"{role}_file",
            role=role,
            reason="No example has an expected answer with text, so none can be scored. Add such examples, or omit "
            "evaluation.test_file.",
        )


def _all_of(faults: dict[str, InvalidTrainingFile], role: FileRole) -> InvalidTrainingFile:
    """Returns the first fault in full, with the names of the other rows, so that the owner can correct all."""
    first, *others = faults
    reason = faults[first].fields["reason"]
    if others:
        reason += (
            " More rows are invalid: "
            f"{_shown(others)}{'; later rows were not read' if len(faults) == _MOST_FAULTS else ''}."
        )
    return InvalidTrainingFile(param=f"{role}_file", role=role, reason=reason)


def _lines(numbers: list[int]) -> str:
    return f"line{'s' if len(numbers) > 1 else ''} {_shown(list(map(str, numbers)))}"


def _names(keys: list[str]) -> str:
    return _shown([f"'{key[:40]}'" for key in keys])


def _shown(some: list[str]) -> str:
    more = f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
    return ", ".join(some[:_SHOWN]) + more


def _take(summary: Summary, row: Judged) -> Example:
    """Adds a row to the figures. Raises its InvalidTrainingFile, if it has one."""
    if row.example is not None:
        _count(summary, row.number, row.example)
    if row.fault is not None or row.example is None:
        raise row.fault or AssertionError("a row without a fault has an example")
    if row.encoded is not None:
        _measure(summary, row.number, row.encoded)
    return row.example


def _count(summary: Summary, number: int, example: Example) -> None:
    summary.examples += 1
    summary.with_tools += bool(example.tools)
    summary.unknown_keys.update(dict.fromkeys(example.unknown_keys))
    if any(message.is_trained and message.is_silent for message in example.messages):
        summary.silent.append(number)
    if isinstance(example, PlainText) and (speaker := find_speaker(example.messages[0].content or "")):
        summary.spoken[number] = speaker
    messages = [*example.messages, example.dispreferred] if isinstance(example, Pair) else example.messages
    if marker := next(filter(None, [find_marker(message.content or "") for message in messages]), None):
        summary.rendered[number] = marker


def _measure(summary: Summary, number: int, encoded: Encoded) -> None:
    sequences = encoded.sequences
    for sequence in sequences:
        length = len(sequence.input_ids)
        summary.tokens += length
        summary.trained_tokens += sequence.trained_tokens
        summary.longest = max(summary.longest, length)
    if encoded.spelled_special:
        summary.spelled[number] = encoded.spelled_special
    if encoded.left_out:
        summary.left_out.append(number)
    elif not sequences:
        summary.unlearnable.append(number)
    elif encoded.truncated:
        summary.truncated.append(number)


def _check_answer(
    summary: Summary, row: Judged, template: ChatTemplate, example: Example, role: FileRole, answered: int
) -> None:
    is_answered = len(summary.answer_tokens) < answered
    if (role != "test" and not is_answered) or not is_answerable(example):
        return
    if role == "test" and isinstance(example, Pair):  # its answers are compared, not generated
        return
    _, wanted = encode_answer(template, example, row.name)
    if role == "test" and not template.answer_text(wanted).strip():
        summary.unscorable.append(row.number)
    if is_answered:
        summary.answer_tokens.append((row.number, template.answer_length(wanted)))


class Overlap:
    """Finds held-out rows that are training rows too, while the files are read, the training file first.

    Rows are the same if their conversations are: format, ids and other extra keys do not matter.
    Takes some 100 bytes of memory per training row, whatever its length.
    """

    def __init__(self) -> None:
        self._lines_of_train: dict[bytes, int] = {}
        self._shared: dict[FileRole, list[str]] = {}

    def add(self, role: FileRole, number: int, digest: bytes) -> None:
        """Keeps a training row's digest, or compares a held-out row's with those kept."""
        if role == "training":
            self._lines_of_train.setdefault(digest, number)
        elif (twin := self._lines_of_train.get(digest)) is not None:
            self._shared.setdefault(role, []).append(f"line {number} (line {twin} there)")

    def reason(self, role: FileRole) -> str | None:
        """Returns which rows the `role` file shares, with their line numbers; None if it shares none."""
        shared = self._shared.get(role)
        if not shared:
            return None
        more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        return (
            f"It shares {len(shared)} example(s) with the training file: {', '.join(shared[:_SHOWN])}{more}. Remove "
            "them from one of the two files."
        )


def _digest(example: Example) -> bytes:
    conversation = example.model_dump(mode="json", include={"messages", "tools"})
    return hashlib.blake2b(json.dumps(conversation, sort_keys=True).encode(), digest_size=16).digest()
