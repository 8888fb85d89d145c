"""Finds how a chat template writes tool calls, by rendering sentinels, so that a model's own calls can be parsed."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from tunery.rows import strict_json
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example, Function, FunctionCall, Message, Tool, ToolCall
from tunery.rows.template import ChatTemplate

_NAMES = ("sentinel_first", "sentinel_second")
_IDS = ("call00000", "call00001")
"""Of the length that Mistral's templates require. A model writes other ids in their place."""
ANY_ID = "call0000."
"""Stands for a call's id in the texts of a spelling."""
_KEY = "sentinel_key"
_TOOL = Tool(function=Function(name=_NAMES[0], parameters={"type": "object"}))
"""Some templates show calls only if some tool is offered."""
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class CallSpelling:
    """The texts around a call's name and arguments, special tokens among them: `before` the name, `between` it and the
    arguments, which are a JSON object, and `after` them. `next`: from one call's arguments to the next one's name;
    None where a message has one call at most. An id is written as ANY_ID."""

    before: str
    between: str
    after: str
    next: str | None = None

    @classmethod
    def find(cls, template: ChatTemplate) -> Self | None:
        """Returns the spelling of a template; None if it shows no calls, or arguments not as JSON."""
        one = _written(template, 1)
        found = None if one is None else _take_apart(one, _NAMES[:1])
        if found is None:
            return None
        before, between, after = found
        # The empty thinking block that some templates put before a call is not part of the call.
        before = before.rpartition("</think>")[2].lstrip()
        two = _written(template, 2)
        both = None if two is None else _take_apart(two, _NAMES)
        return cls(before, between, after, None if both is None else both[2])

    def read(self, text: str) -> list[FunctionCall] | None:
        """Returns the calls of a text that begins with `before`; None if it is not complete calls to its end."""
        calls, place = [], len(self.before)
        try:
            while True:
                call, place = self._read_one(text, place)
                calls.append(call)
                following = None if self.next is None else _loosely(self.next).match(text, place)
                if following is None:
                    break
                place = following.end()
        except ValueError:
            return None
        return calls if _loosely(self.after).sub("", text[place:], count=1).strip() == "" else None

    def _read_one(self, text: str, place: int) -> tuple[FunctionCall, int]:
        found = _loosely(self.between).search(text, place)
        if found is None:
            raise ValueError("no arguments follow")
        _, end = _DECODER.raw_decode(text, found.end())
        arguments = text[found.end() : end]
        strict_json.load_object(arguments)
        return FunctionCall(name=text[place : found.start()], arguments=arguments), end


def _written(template: ChatTemplate, many: int) -> str | None:
    """Returns the text that a model has to write for `many` calls, with its special tokens."""
    calls = [
        ToolCall(id=id, function=FunctionCall(name=name, arguments=json.dumps({_KEY: "value"})))
        for id, name in zip(_IDS[:many], _NAMES, strict=False)
    ]
    question = Message(role="user", content="question")
    example = Example(messages=[question, Message(role="assistant", tool_calls=calls)], tools=[_TOOL])
    try:
        _, ids = template.encode_answer(example)
    except CannotRender:
        return None
    text: str = template.tokenizer.decode(ids[: template.answer_length(ids)], skip_special_tokens=False)
    return re.sub("|".join(_IDS), ANY_ID, text)


def _take_apart(text: str, names: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the texts around names and arguments; with two calls, the third is the text between the calls."""
    texts, place = [], 0
    for name in names:
        at = text.find(name, place)
        arguments = next(_objects(text, at + len(name)), None) if at >= 0 else None
        if arguments is None:
            return None
        start, end = arguments
        texts += [text[place:at], text[at + len(name) : start]]
        place = end
    return *texts, text[place:]


def _objects(text: str, place: int) -> Iterator[tuple[int, int]]:
    """Yields where the arguments of the sentinels begin and end, from `place` on."""
    for found in re.finditer(r"\{", text[place:]):
        start = place + found.start()
        try:
            value, end = _DECODER.raw_decode(text, start)
        except ValueError:
            continue
        if value == {_KEY: "value"}:
            yield start, end


def _loosely(text: str) -> re.Pattern[str]:
    """Returns a pattern of the text with whitespace of any length, also around JSON's punctuation, and any id."""
    pieces = re.findall(rf"{re.escape(ANY_ID)}|\w+|[^\w\s]", text)
    patterns = (r"[\w-]+" if piece == ANY_ID else re.escape(piece) for piece in pieces)
    return re.compile(r"\s*" + r"\s*".join(patterns) + r"\s*")
