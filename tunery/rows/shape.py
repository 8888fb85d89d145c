"""A shape of rows: which keys hold the conversation, and how they become chat messages in OpenAI's spelling."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.rows import conversations, keys, rendered, strict_json
from tunery.rows.rendered import CHATML_BEGIN, CHATML_END

CHAT = "chat messages"
SHAREGPT = "ShareGPT"
ALPACA = "Alpaca"
CHATML = "ChatML text"
PLAIN = "plain text"


SYSTEMS = ("system", "system_prompt", "system_message")
_CHATML_HEAD = re.compile(rf"{re.escape(CHATML_BEGIN)}(\w+)\r?\n")
WRITE_ROWS = (
    "If the file holds a table by its columns, write an object for each row (in pandas: to_json(orient='records', "
    "lines=True))."
)
_BLANK = re.compile(r"\s*")


@dataclass(frozen=True)
class Shape:
    """A shape's name, and the row's key of each part: `messages`, or `user` and `assistant`.

    `optional`: names of keys that a row may have besides, by part: `system`, `context`, `input`, `history`, and
    `label`, which is not read.
    """

    name: str
    columns: Mapping[str, str]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has every key that the shape needs."""
        return all(row.get(key) is not None for key in self.columns.values())

    def used(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Returns the key of each part that a row has."""
        if not self.optional:
            return dict(self.columns)
        named = keys.by_name(row)
        found = {part: next(filter(named.__contains__, names), None) for part, names in self.optional.items()}
        return {**self.columns, **{part: named[name] for part, name in found.items() if name is not None}}

    def convert(self, row: dict[str, Any], used: Mapping[str, str]) -> dict[str, Any]:
        """Returns the row with `messages` in place of the `used` keys, of which these are made. Raises ValueError."""
        rest = {key: value for key, value in row.items() if key not in used.values()}
        parts = {part: row[key] for part, key in used.items()}
        return {**rest, "messages": self._messages(parts, used)}

    def _messages(self, parts: dict[str, Any], used: Mapping[str, str]) -> Any:
        if "text" in parts:
            return _chatml(parts["text"])
        if "messages" not in parts:
            return _turns(parts, used)
        messages = conversations.convert(parts["messages"], used["messages"])
        return [*_system(parts, used, messages), *messages] if isinstance(messages, list) else messages

    def describe(self, used: Mapping[str, str]) -> str:
        """Returns a description of the shape and of what each column becomes."""
        pairs = ", ".join(f"'{key}' as {PARTS[part]}" for part, key in used.items())
        return f"{self.name} rows: {pairs}"


class TextShape(Shape):
    """Plain text, all tokens of which are learned, without a prompt."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        return super().fits(row) and not rendered.is_chatml(row[self.columns["text"]])

    def convert(self, row: dict[str, Any], used: Mapping[str, str]) -> dict[str, Any]:
        key = used["text"]
        rest = {name: value for name, value in row.items() if name != key}
        message = text_message("assistant", row[key], key)
        _refuse_rendered(message["content"], key)
        return {**rest, "messages": [message]}

    def describe(self, used: Mapping[str, str]) -> str:
        return f"{self.name} rows: every token of '{used['text']}' is learned, and the end token after it"


PARTS = {
    "messages": "the conversation",
    "text": "the conversation",
    "system": "the system message",
    "history": "earlier turns",
    "context": "text before the question",
    "user": "the user's message",
    "input": "text after it",
    "assistant": "the answer",
    "request": "the request",
    "preferred": "the preferred answer",
    "dispreferred": "the other answer",
}
"""What each part of a row becomes, in words."""


CHAT_SHAPE = Shape(CHAT, {"messages": "messages"})


# --- from a row's parts to messages -------------------------------------------------------------------------------


def _turns(parts: Mapping[str, Any], used: Mapping[str, str]) -> list[Any]:
    """Returns the messages of a question and an answer, with the row's further parts."""
    answer = parts["assistant"]
    asked = prompt_turns(parts, used)
    if isinstance(answer, list):
        return [*asked, *_check_messages(answer, used["assistant"])]
    return [*asked, text_message("assistant", answer, used["assistant"])]


def prompt_turns(parts: Mapping[str, Any], used: Mapping[str, str]) -> list[Any]:
    """Returns the messages of a question with the row's further parts. A prompt that is a list of messages is kept, and
    its assistant messages are not learned. Raises ValueError."""
    asked = parts["user"]
    is_list = isinstance(asked, list)
    before = [*_system(parts, used, asked if is_list else ()), *_history(parts.get("history"))]
    return [*before, *(as_given(_check_messages(asked, used["user"])) if is_list else [_user(parts, used)])]


def _check_messages(value: list[Any], key: str) -> list[Any]:
    """Returns a list of messages. Raises ValueError for one of texts, as columns and pairs of answers are."""
    if value and not any(isinstance(item, dict) for item in value):
        raise ValueError(
            f"'{key[:40]}' must be a text or a list of messages, but is a list of {len(value)} other values. "
            f"{WRITE_ROWS} Two answers to compare belong in 'chosen' and 'rejected'."
        )
    return value


def _user(parts: Mapping[str, Any], used: Mapping[str, str]) -> dict[str, Any]:
    message = text_message("user", parts["user"], used["user"])
    if more := _optional_text(parts, used, "input"):
        message["content"] = _joined("\n", message["content"], more)
    if context := _optional_text(parts, used, "context"):
        message["content"] = _joined("\n\n", context, message["content"])
    return message


def _joined(between: str, *texts: str) -> str:
    return between.join(text for text in texts if text.strip())


def _system(parts: Mapping[str, Any], used: Mapping[str, str], messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the row's system message, unless `messages` begin with it. Raises ValueError for two different ones."""
    text = _optional_text(parts, used, "system")
    if not text or not begins_with_system(messages):
        return [{"role": "system", "content": text}] if text else []
    if not keys.is_same(messages[0].get("content"), text):
        raise ValueError(
            f"'{used['system'][:40]}' would be ignored, as the conversation begins with another system message. Keep "
            "one of them."
        )
    return []


def _optional_text(parts: Mapping[str, Any], used: Mapping[str, str], part: str) -> str:
    if part not in parts:
        return ""
    text: str = text_message("", parts[part], used[part])["content"]
    return text if text.strip() else ""


def text_message(role: str, value: Any, key: str) -> dict[str, Any]:
    """Returns a message with the text of a row's key. Raises ValueError."""
    if isinstance(value, dict) and "0" in value:  # as pandas writes columns
        raise ValueError(f"'{key[:40]}' must be a text, not a column of texts. {WRITE_ROWS}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(  # noqa: TRY004 (to callers every fault of a row is one kind)
            f"'{key[:40]}' must be a text, not {strict_json.kind(value)}. Write it as the string that the model should "
            "read or write."
        )
    return {"role": role, "content": value if isinstance(value, str) else json.dumps(value)}


def as_given(messages: list[Any]) -> list[Any]:
    """Returns the messages marked as not learned."""
    return [
        {**message, "weight": 0} if isinstance(message, dict) and message.get("role") == "assistant" else message
        for message in messages
    ]


def _history(value: Any) -> list[dict[str, Any]]:
    """Returns the messages of earlier turns, which are pairs of a question and an answer."""
    is_absent = value is None or (isinstance(value, str) and not value.strip())
    pairs = [] if is_absent else conversations.decoded(value, "history")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError('\'history\' must be a list of pairs: [["question", "answer"], ...].')
    turns = [zip(("user", "assistant"), pair, strict=True) for pair in pairs]
    return [text_message(role, text, "history") for pair in turns for role, text in pair]


def begins_with_system(messages: Sequence[Any]) -> bool:
    """Whether the first message is the system's."""
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role") in ("system", "developer")


def _refuse_rendered(text: str, key: str) -> None:
    """Raises ValueError for a conversation that a chat template has rendered, of which every token would be learned."""
    if (mark := rendered.find_turn(text)) is not None:
        raise ValueError(
            f"'{key[:40]}' begins with '{mark}', so a chat template has already rendered it. Its prompts would be "
            "learned, and its special tokens as plain text. Send the conversation as 'messages'; the template of the "
            "job's model renders it."
        )


def _chatml(text: Any) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    place, text = 0, rendered.bare(text) if isinstance(text, str) else ""
    while place < len(text):
        # Not by one pattern for a turn: it would read the rest of the text once for each turn without an end.
        head = _CHATML_HEAD.match(text, place)
        end = -1 if head is None else text.find(CHATML_END, head.end())
        if head is None or end < 0:
            turns = []
            break
        turns.append({"role": head[1], "content": text[head.end() : end]})
        place = _after_blank(text, end + len(CHATML_END))
    if not turns:
        raise ValueError("'text' must be whole turns of ChatML: <|im_start|>ROLE, a line break, the text, <|im_end|>.")
    return turns


def _after_blank(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    assert found is not None, "no blanks match too"
    return found.end()
