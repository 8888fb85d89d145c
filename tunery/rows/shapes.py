"""Shapes of rows: which keys hold the conversation, and how they become chat messages in OpenAI's spelling.

The first row that has a shape decides for its file. A preference row or plain text is no shape: it is refused by name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunery.rows import conversations, keys, strict_json
from tunery.rows.formats import SourceRow

CHAT = "chat messages"
SHAREGPT = "ShareGPT"
ALPACA = "Alpaca"
CHATML = "ChatML text"


def _any_case(*names: str) -> tuple[str, ...]:
    return (*names, *map(str.capitalize, names))


_QUESTIONS = ("prompt", "instruction", "input", "question", "query", "user")
_ANSWERS = ("completion", "response", "output", "answer", "assistant", "target")
_LABELS = ("label_text", "label")
_SYSTEMS = _any_case("system", "system_prompt", "system_message")
_CONVERSATIONS = ("conversations", "conversation")
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
_START = "Unexpected file format"


@dataclass(frozen=True)
class Shape:
    """A shape's name, and the row's key of each part: `messages`, or `user` and `assistant`.

    `optional`: spellings of keys that a row may have besides, by part: `system`, `context`, `input`, `history`, and
    `label`, which is not read.
    """

    name: str
    columns: Mapping[str, str]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has every key that the shape needs."""
        return all(row.get(key) is not None for key in self.columns.values())

    def used(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The key of each part that a row has."""
        found = {
            part: next((key for key in spellings if key in row), None) for part, spellings in self.optional.items()
        }
        return {**self.columns, **{part: key for part, key in found.items() if key is not None}}

    def convert(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with `messages` in place of the keys that it makes them of. Raises ValueError."""
        used = self.used(row)
        rest = {key: value for key, value in row.items() if key not in used.values()}
        parts = {part: row[key] for part, key in used.items()}
        return {**rest, "messages": self._messages(parts, used)}

    def _messages(self, parts: dict[str, Any], used: dict[str, str]) -> Any:
        if "text" in parts:
            return _chatml(parts["text"])
        if "messages" not in parts:
            return _turns(parts, used)
        messages = conversations.convert(parts["messages"], used["messages"])
        if isinstance(messages, list) and "system" in parts and not _begins_with_system(messages):
            return [*_system(parts, used), *messages]
        return messages

    def describe(self, used: Mapping[str, str]) -> str:
        """The shape and what becomes of each column, for people."""
        pairs = ", ".join(f"'{key}' as {_PARTS[part]}" for part, key in used.items())
        return f"{self.name} rows: {pairs}"


_PARTS = {
    "messages": "the conversation",
    "text": "the conversation",
    "system": "the system message",
    "history": "earlier turns",
    "context": "text before the question",
    "user": "the user's message",
    "input": "text after it",
    "assistant": "the answer",
}


CHAT_SHAPE = Shape(CHAT, {"messages": "messages"})


class FileShape:
    """The shape of one file's rows, as its first row has it, and the keys that have been read of them so far."""

    def __init__(self) -> None:
        self.shape: Shape | None = None
        self.used: dict[str, str] = {}
        self._first = 0

    def convert(self, source: SourceRow) -> dict[str, Any]:
        """A row's fields, with `messages`. Raises ValueError, also for a row of another shape than the first one's."""
        row: dict[str, Any] = keys.present(source.load())
        if self.shape is None:
            self.shape, self._first = detect(row), source.number
        elif not self.shape.fits(row):
            raise ValueError(self._differs(row))
        self.used |= self.shape.used(row)
        return row if self.shape.name == CHAT else self.shape.convert(row)

    @property
    def name(self) -> str | None:
        return self.shape.name if self.shape is not None else None

    def describe(self) -> str | None:
        """What the file's columns become; None for chat messages, which are taken as they are."""
        if self.shape is None or self.shape.name == CHAT:
            return None
        return self.shape.describe({part: self.used[part] for part in _PARTS if part in self.used})

    def _differs(self, row: dict[str, Any]) -> str:
        assert self.shape is not None, "there is a shape to differ from"
        expected = f"{_START}, expected {self.shape.name} as in row {self._first}"
        try:
            other = detect(row).name
        except ValueError:
            if any(map(keys.compares, row)):
                raise
            missing = next(key for key in self.shape.columns.values() if key not in row)
            return f"{expected}: the key '{missing}' is missing."
        return f"{expected}: this is a row of {other}. Put rows of another shape into a file of their own."


def detect(row: Mapping[str, Any]) -> Shape:
    """The shape of a row without nulls. Raises ValueError, with what to do, where it has none that can be trained."""
    if "messages" in row:
        speaks = conversations.is_sharegpt(row["messages"])
        return Shape(SHAREGPT, {"messages": "messages"}, {"system": _SYSTEMS}) if speaks else CHAT_SHAPE
    if any(map(keys.compares, row)):
        raise ValueError(keys.PREFERENCE)
    for key in _CONVERSATIONS:
        if key in row:
            return Shape(SHAREGPT, {"messages": key}, {"system": _SYSTEMS})
    if isinstance(text := row.get("text"), str) and text.lstrip().startswith("<|im_start|>"):
        return Shape(CHATML, {"text": "text"})
    return _pair(row)


def _pair(row: Mapping[str, Any]) -> Shape:
    """The shape of a row with a question and an answer, under whichever names."""
    names = {key.strip().casefold(): key for key in row}
    asked = [key for key in _QUESTIONS if key in names]
    answered = [key for key in _ANSWERS if key in names]
    if asked == ["instruction", "input"]:
        asked = ["instruction"]
    if not asked and "text" in names:
        asked = ["text"]
    if asked and not answered:
        answered = _label(row, names)
    if not asked or not answered:
        raise ValueError(_no_shape(row))
    _refuse_ambiguous([names[key] for key in asked], "question")
    _refuse_ambiguous([names[key] for key in answered], "answer")
    optional = {"system": _SYSTEMS, "context": _any_case("context"), "history": ("history",)}
    if asked == ["instruction"]:
        optional["input"] = _any_case("input")
    if answered == ["label_text"]:
        optional["label"] = ("label",)  # the same class as a number
    name = ALPACA if (asked, answered) == (["instruction"], ["output"]) else f"{asked[0]}/{answered[0]}"
    return Shape(name, {"user": names[asked[0]], "assistant": names[answered[0]]}, optional)


def _label(row: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """The column with a class's name, or its number. True and false judge an answer, which is another thing."""
    found = [key for key in _LABELS if key in names and not isinstance(row[names[key]], bool)]
    return found[:1]


def _refuse_ambiguous(columns: list[str], part: str) -> None:
    if len(columns) > 1:
        named = ", ".join(f"'{column[:40]}'" for column in columns)
        raise ValueError(f"{_START}: each of {named} may be the {part}. Keep one and remove the others.")


def _no_shape(row: Mapping[str, Any]) -> str:
    if isinstance(row.get("text"), str) and not keys.find_meaning(row):
        return (
            f"{_START}: this is plain text, and only the method 'supervised' is supported, which learns answers. Split "
            'each row into a question and its answer: {"prompt": "...", "completion": "..."}.'
        )
    expected = f"{_START}, expected chat messages: the key 'messages' is missing"
    if meaning := keys.find_meaning(row):
        return f"{expected}, and the row {meaning}"
    shown = ", ".join(f"'{key[:40]}'" for key in list(row)[:8])
    return (
        f"{expected}. The row has {shown or 'no keys'}; pairs such as prompt/completion, question/answer and "
        "instruction/input/output are read too."
    )


# --- from a row's parts to messages -------------------------------------------------------------------------------


def _turns(parts: Mapping[str, Any], used: Mapping[str, str]) -> list[Any]:
    """Messages of a question and an answer, with what stands beside them. Prompts that are lists of messages stay so,
    and what an assistant says in them is not learned: it was given, not wanted."""
    asked, answer = parts["user"], parts["assistant"]
    before = [*_system(parts, used), *_history(parts.get("history"))]
    given = _as_given(asked) if isinstance(asked, list) else [_user(parts, used)]
    wanted = answer if isinstance(answer, list) else [_message("assistant", answer, used["assistant"])]
    if isinstance(asked, list) and _begins_with_system(asked):
        before = [message for message in before if message["role"] != "system"]
    return [*before, *given, *wanted]


def _user(parts: Mapping[str, Any], used: Mapping[str, str]) -> dict[str, Any]:
    message = _message("user", parts["user"], used["user"])
    if context := _optional_text(parts, used, "context"):
        message["content"] = f"{context}\n\n{message['content']}"
    if more := _optional_text(parts, used, "input"):
        message["content"] = f"{message['content']}\n{more}"
    return message


def _system(parts: Mapping[str, Any], used: Mapping[str, str]) -> list[dict[str, Any]]:
    text = _optional_text(parts, used, "system")
    return [{"role": "system", "content": text}] if text else []


def _optional_text(parts: Mapping[str, Any], used: Mapping[str, str], part: str) -> str:
    if part not in parts:
        return ""
    text: str = _message("", parts[part], used[part])["content"]
    return text if text.strip() else ""


def _message(role: str, value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(  # noqa: TRY004 (to callers every fault of a row is one kind)
            f"'{key[:40]}' must be a text, not {strict_json.kind(value)}. Spell it as the string that the model shall "
            "read or write."
        )
    return {"role": role, "content": value if isinstance(value, str) else json.dumps(value)}


def _as_given(messages: list[Any]) -> list[Any]:
    return [
        {**message, "weight": 0} if isinstance(message, dict) and message.get("role") == "assistant" else message
        for message in messages
    ]


def _history(value: Any) -> list[dict[str, Any]]:
    """Earlier turns, as pairs of a question and an answer."""
    pairs = conversations.decoded(value, "history") if value is not None else []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError('\'history\' must be a list of pairs: [["question", "answer"], ...].')
    turns = [zip(("user", "assistant"), pair, strict=True) for pair in pairs]
    return [_message(role, text, "history") for pair in turns for role, text in pair]


def _begins_with_system(messages: list[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role") in ("system", "developer")


def _chatml(text: Any) -> list[dict[str, Any]]:
    turns = list(_CHATML_TURN.finditer(text.strip())) if isinstance(text, str) else []
    if not turns or sum(len(turn[0]) for turn in turns) != len(text.strip()):
        raise ValueError("'text' must be whole turns of ChatML: <|im_start|>ROLE, a line break, the text, <|im_end|>.")
    return [{"role": turn[1], "content": turn[2]} for turn in turns]
