"""Detects the shape of a file's rows by their keys.

The first row whose shape is recognised sets that of the whole file. `FileShape.columns` maps columns whose names are
not recognised.
"""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from tunery.rows import conversations, keys, pairs
from tunery.rows.formats import SourceRow
from tunery.rows.rendered import is_chatml
from tunery.rows.shape import (
    ALPACA,
    CHAT,
    CHAT_SHAPE,
    CHATML,
    PARTS,
    PLAIN,
    SHAREGPT,
    SYSTEMS,
    WRITE_ROWS,
    Shape,
    TextShape,
)

_QUESTIONS = ("prompt", "instruction", "input", "question", "query", "user")
_ANSWERS = ("completion", "response", "output", "answer", "assistant", "target")
_LABELS = ("label_text", "label")
_CONVERSATIONS = ("conversations", "conversation")
_START = "Unexpected file format"
_CLASSES = ("intent", "category", "class", "class_name", "labels", "sentiment", "emotion", "topic")
"""Names of a column that may hold the class of a text, or only describe it."""
_BESIDE_TEXT = frozenset({*_ANSWERS, *_LABELS, *_CLASSES})
_OF_CHATS = frozenset({"messages", "tools", "functions", "parallel_tool_calls"})
"""Keys that are read by this spelling."""
_OF_OPENAI = (CHAT, pairs.OPENAI)
"""Names of the shapes that OpenAI's fine-tuning defines."""
_TEXTS = frozenset({"user", "assistant", "text", "preferred", "dispreferred"})
"""Parts that are a text, also an empty one. An empty cell of a table is one; in other columns it counts as absent."""
_PARTS = frozenset({*_QUESTIONS, *_BESIDE_TEXT, *_CONVERSATIONS, *_OF_CHATS, "text", "context"})


class FileShape:
    """The shape of one file's rows, as of its first row, and the keys that have been read so far."""

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        """`columns`: by part, as in `spec.Columns`; only these are read."""
        self.columns = dict(columns or {})
        self.shape: Shape | None = None
        self.used: dict[str, str] = {}
        self._first = ""

    def load(self, source: SourceRow) -> dict[str, Any]:
        """Returns a row's non-null fields, by the names that shapes use. Raises ValueError if a column is missing."""
        row: dict[str, Any] = keys.present(source.load())
        if not self.columns:
            return row if len(row) == 1 and "messages" in row else _respell(row)
        if all(column not in source.load() for column in self.columns.values()):
            named = ", ".join(f"'{column[:40]}'" for column in self.columns.values())
            seen = _seen(list(self.columns.values()), source.load())
            raise ValueError(f"{_START}: the row has none of the columns {named}. {seen} Correct 'columns'.")
        return {part: row[column] for part, column in self.columns.items() if column in row}

    def convert(self, source: SourceRow) -> dict[str, Any]:
        """Returns a row's fields with `messages`. Raises ValueError, also if its shape differs from the first row's."""
        row = self.load(source)
        if self.shape is None:
            self.shape, self._first = self._detect(row, source), source.name
        if not self.shape.fits(row):
            row |= self._empty_texts(source)
            if not self.shape.fits(row):
                raise ValueError(self._differs(row))
        used = self.shape.used(row)
        self.used |= used
        return row if self.shape.name == CHAT else self.shape.convert(row, used)

    def _detect(self, row: dict[str, Any], source: SourceRow) -> Shape:
        read = self.columns or source.load()
        if source.is_table and not self.columns:
            _refuse_twins(read)  # also of columns that are empty here
        empty = {key: "" for key in read if key not in row}
        try:
            shape = detect(row)
        except ValueError as error:
            if (filled := _fill(row, empty)) is None:
                raise
            return self._take_filled(filled, empty, source, error)
        if isinstance(shape, TextShape):
            # A text is no whole row where other rows have its answer or class.
            answers = {key: "" for key in empty if keys.name(key) in _BESIDE_TEXT}
            detect({**row, **answers})
            if (filled := _fill(row, answers)) is not None:
                return self._take_filled(filled, answers, source)
        return shape

    def _take_filled(
        self, shape: Shape, empty: Mapping[str, str], source: SourceRow, cause: ValueError | None = None
    ) -> Shape:
        """Returns the shape of a row with values in its `empty` columns. Raises ValueError if it lacks one that cannot
        be an empty text."""
        missing = {part: key for part, key in shape.columns.items() if key in empty}
        fields = source.load()
        absent = [name for name in (self.columns.get(key, key) for key in missing.values()) if name not in fields]
        if source.is_table and missing.keys() <= _TEXTS and not absent:
            return shape
        reason = _lacks_value(shape, next(iter(missing.values())), self.columns)
        raise ValueError(f"{reason} {_seen(absent, fields)}" if absent else reason) from cause

    def fill(self, source: SourceRow) -> SourceRow:
        """Returns a row of a table with an empty text for each empty cell that is read as one; any other unchanged."""
        if source.fields is None or not source.is_table:
            return source
        if self.shape is None:
            with suppress(ValueError):
                self.convert(source)
        texts = {self.columns.get(key, key): text for key, text in self._empty_texts(source).items()}
        return source._replace(fields={**source.fields, **texts})

    def _empty_texts(self, source: SourceRow) -> dict[str, str]:
        """Returns the texts of a row of a table that are empty cells."""
        if not source.is_table or self.shape is None:
            return {}
        fields, texts = source.load(), [key for part, key in self.shape.columns.items() if part in _TEXTS]
        return {key: "" for key in texts if fields.get(self.columns.get(key, key), "") is None}

    @property
    def name(self) -> str | None:
        return self.shape.name if self.shape is not None else None

    def describe(self) -> str | None:
        """Returns what the file's columns become; None for rows in OpenAI's formats, which are used as they are."""
        if self.shape is None or (self.shape.name in _OF_OPENAI and not self.columns):
            return None
        used = self.shape.used({}) if self.shape.name == CHAT else self.used
        named = {part: self.columns.get(used[part], used[part]) for part in PARTS if part in used}
        return self.shape.describe(named) + ("; other columns are not read" if self.columns else "")

    def _differs(self, row: dict[str, Any]) -> str:
        assert self.shape is not None, "there is a shape to differ from"
        expected = f"{_START}, expected {self.shape.name} as in {self._first}"
        try:
            other = detect(row).name
        except ValueError:
            if any(map(keys.compares, row)):
                raise
            missing = next(key for key in self.shape.columns.values() if key not in row)
            return f"{expected}: the key '{self.columns.get(missing, missing)}' is missing."
        return f"{expected}: this row has the shape {other}. Put rows of different shapes into separate files."


def detect(row: Mapping[str, Any]) -> Shape:
    """Returns the shape of a row without nulls. Raises ValueError, with what to do, if it has no trainable shape."""
    if (pair := pairs.detect(row)) is not None:
        return pair
    named = keys.by_name(row)
    if "messages" in row:
        is_sharegpt = conversations.is_sharegpt(row["messages"])
        return Shape(SHAREGPT, {"messages": "messages"}, {"system": SYSTEMS}) if is_sharegpt else CHAT_SHAPE
    if any(map(keys.compares, row)):
        raise ValueError(keys.HALF_A_PAIR)
    for name in _CONVERSATIONS:
        if name in named:
            return Shape(SHAREGPT, {"messages": named[name]}, {"system": SYSTEMS})
    if "text" in named and is_chatml(row[named["text"]]):
        return Shape(CHATML, {"text": named["text"]})
    return _question_answer(row, named)


def _respell(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row in which the keys of chats have their usual spelling. Raises ValueError if two keys that are read
    have the same name."""
    names = list(map(keys.name, row))
    if len(set(names)) < len(names):
        _refuse_twins(row)
    if names == list(row) or _OF_CHATS.isdisjoint(names):
        return row
    return {known if known in _OF_CHATS else key: row[key] for known, key in zip(names, row, strict=True)}


def _refuse_twins(row: Mapping[str, Any]) -> None:
    first: dict[str, str] = {}
    for key in row:
        known = keys.name(key)
        if known in first and (known in _PARTS or keys.has_meaning(known) or keys.compares(known)):
            raise ValueError(
                f"{_START}: '{first[known]}' and '{key}' are two spellings of the same key. Keep one of them, "
                f"rename the other, or name the columns to use {keys.BY_HAND}"
            )
        first[known] = key


def _question_answer(row: Mapping[str, Any], names: Mapping[str, str]) -> Shape:
    """Returns the shape of a row with a question and an answer. `names`: its keys by their names."""
    asked = [key for key in _QUESTIONS if key in names]
    answered = [key for key in _ANSWERS if key in names]
    if "instruction" in asked and "input" in asked:
        asked.remove("input")
    if not asked and "text" in names:
        asked = ["text"]
    if asked and not answered:
        answered = _find_label_column(row, names)
    is_text = asked == ["text"] and not answered and isinstance(row[names["text"]], str) and "role" not in names
    if is_text and not keys.find_meaning(row):
        _refuse_class(names)
        return TextShape(PLAIN, {"text": names["text"]})
    if not asked or not answered:
        raise ValueError(_no_shape(row))
    _refuse_ambiguous([names[key] for key in asked], "question")
    _refuse_ambiguous([names[key] for key in answered], "answer")
    optional = {"system": SYSTEMS, "context": ("context",), "history": ("history",)}
    if asked == ["instruction"]:
        optional["input"] = ("input",)
    if answered == ["label_text"]:
        optional["label"] = ("label",)  # the number of the class that label_text names
    name = ALPACA if (asked, answered) == (["instruction"], ["output"]) else f"{asked[0]}/{answered[0]}"
    return Shape(name, {"user": names[asked[0]], "assistant": names[answered[0]]}, optional)


def _find_label_column(row: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Returns the column with a class's name or number. Booleans are none: in preference data they rate an answer."""
    found = [key for key in _LABELS if key in names and not isinstance(row[names[key]], bool)]
    return found[:1]


def _refuse_ambiguous(columns: list[str], part: str) -> None:
    if len(columns) > 1:
        named = ", ".join(f"'{column[:40]}'" for column in columns)
        advice = f"Keep one and remove the others, or name the columns to use {keys.BY_HAND}"
        raise ValueError(f"{_START}: each of {named} may be the {part}. {advice}")


def _refuse_class(names: Mapping[str, str]) -> None:
    if (key := next(filter(names.__contains__, _CLASSES), None)) is not None:
        raise ValueError(
            f"{_START}: '{names[key][:40]}' may be the class of 'text', or only describe it. Name 'text' as the prompt "
            f"and '{names[key][:40]}' as the completion, or 'text' alone as the text, {keys.BY_HAND}"
        )


def _no_shape(row: Mapping[str, Any]) -> str:
    expected = f"{_START}, expected chat messages: the key 'messages' is missing"
    # A class that is no boolean judges no answer.
    judged = {key: value for key, value in row.items() if keys.name(key) not in _LABELS or isinstance(value, bool)}
    if meaning := keys.find_meaning(judged):
        advice = (
            "" if can_be_named(meaning) or not _may_be_named(row) else f" Or name the columns to read {keys.BY_HAND}"
        )
        return f"{expected}, and the row {meaning}{advice}"
    if "role" in row and ("content" in row or "text" in row):
        return f'{_START}: the row is a single message. Write each conversation as one row, {{"messages": [...]}}.'
    if key := next((key for key, value in row.items() if _are_rows(value)), None):
        return f"{expected}. '{key[:40]}' is a list of rows: send this list alone, as a JSON array."
    shown = ", ".join(f"'{key[:40]}'" for key in list(row)[:8])
    if row and all(isinstance(value, list) for value in row.values()):
        return f"{_START}: every value of the row ({shown}) is a list. {WRITE_ROWS}"
    return (
        f"{expected}. The row has {shown or 'no keys'}; pairs such as prompt/completion, question/answer and "
        "instruction/input/output are read too." + (f" Name other columns {keys.BY_HAND}" if _may_be_named(row) else "")
    )


def _are_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    try:
        detect(value[0])
    except ValueError:
        return False
    return True


def _fill(row: Mapping[str, Any], empty: Mapping[str, str]) -> Shape | None:
    """Returns the shape that a row would have with values in its empty columns; None if it would have none."""
    try:
        shape = detect({**row, **empty}) if empty else None
    except ValueError:
        return None
    return shape if shape is not None and not empty.keys().isdisjoint(shape.columns.values()) else None


def _lacks_value(shape: Shape, missing: str, columns: Mapping[str, str]) -> str:
    return (
        f"{_START}: the row is like those of {shape.name}, but has no value in '{columns.get(missing, missing)}'. Add "
        f"it, remove the row, or name other columns {keys.BY_HAND}"
    )


def _seen(absent: list[str], fields: Mapping[str, Any]) -> str:
    """Returns which columns a row has, and those whose names are close to those of the absent ones."""
    found = ", ".join(f"'{key[:40]}'" for key in list(fields)[:8])
    close = chain.from_iterable(difflib.get_close_matches(name, fields, n=1) for name in absent)
    meant = ", ".join(f"'{name[:40]}'" for name in dict.fromkeys(close))
    return f"It has {found or 'no keys'}." + (f" Did you mean {meant}?" if meant else "")


def _may_be_named(row: Mapping[str, Any]) -> bool:
    """Whether a mapping of the row's columns could make a row; a single column must be a text or a conversation."""
    return len(row) > 1 or any(isinstance(value, str | list) for value in row.values())


def can_be_named(reason: str) -> bool:
    """Whether a row was refused only for its keys, of which a job can name those to read."""
    return keys.BY_HAND in reason
