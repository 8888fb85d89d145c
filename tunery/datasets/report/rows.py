"""Rows as a report sees them, including those that a job would refuse, as the report must name them."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunery.datasets.errors import NothingToCompare
from tunery.datasets.report import calls, texts
from tunery.datasets.report.verdict import ANY_METHOD
from tunery.failures import InvalidTrainingFile
from tunery.rows import readers
from tunery.rows.formats import SourceRow
from tunery.rows.messages import Example, Message, PlainText
from tunery.rows.preferences import Pair
from tunery.rows.shapes import FileShape

SYSTEM = frozenset({"system", "developer"})
"""Roles that stand before a conversation."""
PLAIN = "text"
"""The role of a plain text, which is no one's turn."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: who speaks, its text, and whether it calls a tool."""

    role: str
    text: str
    calls: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `line`: its number, see `SourceRow`. `fault`: why a job would refuse it. `rejected`: the text of a
    pair's other answer. `tools`: the names of those that it offers; `misfit`: why its calls do not fit them.
    `question`: all that is said before the answer, by system messages not, since these stand before every question
    alike."""

    line: int
    turns: tuple[Turn, ...]
    fault: str | None = None
    rejected: str = ""
    tools: tuple[str, ...] = ()
    misfit: str | None = None
    system: str = field(init=False)
    question: str = field(init=False)
    answer: str = field(init=False)

    def __post_init__(self) -> None:
        last = max((at for at, turn in enumerate(self.turns) if turn.role == "assistant"), default=len(self.turns))
        asked = [turn.text for turn in self.turns[:last] if turn.role not in SYSTEM]
        put = object.__setattr__
        put(self, "system", "\n".join(turn.text for turn in self.turns if turn.role in SYSTEM))
        put(self, "question", "\n".join(asked))
        put(self, "answer", self.turns[last].text if last < len(self.turns) else "")

    @property
    def is_plain(self) -> bool:
        """Whether the row is a plain text, which is all its question and has no answer."""
        return [turn.role for turn in self.turns] == [PLAIN]

    @property
    def learned_bytes(self) -> int:
        """UTF-8 bytes of what a model learns of the row: its answers, or the plain text."""
        learned = (turn.text for turn in self.turns if turn.role in ("assistant", PLAIN))
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in learned)

    @property
    def texts(self) -> list[str]:
        """All texts of the row."""
        return [*(turn.text for turn in self.turns), self.rejected]

    @property
    def size(self) -> int:
        """Characters of all texts."""
        return sum(map(len, self.texts))


def read(path: Path, most: int = sys.maxsize, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Returns a file's first rows, up to `most` characters in all. Raises InvalidRows if its bytes are not rows.

    `columns`: see `FileShape`.
    """
    rows: list[Row] = []
    shape = FileShape(columns)
    for source in readers.read(readers.chunks_of(path)):
        row = of_source(source._replace(shape=shape))
        most -= row.size
        if most < 0:
            break
        rows.append(row)
    return rows


def read_other(path: Path, most: int, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Returns the first rows of a file to compare with: by `columns` if they make rows of it, else by its own names.

    Raises InvalidRows, NothingToCompare.
    """
    rows = read(path, most, columns)
    if columns and not _has_usable(rows):
        own = read(path, most)
        rows = own if _has_usable(own) else rows
    if not any(map(can_be_compared, rows)):
        first = next((row for row in rows if row.fault), rows[0])
        raise NothingToCompare(param="against", line=first.line, reason=first.fault or "It has no prompt.")
    return rows


def can_be_compared(row: Row) -> bool:
    """Whether there is something to compare: also in a row that a job would refuse, as one without an answer."""
    return bool(row.question.strip())


def _has_usable(rows: Iterable[Row]) -> bool:
    return any(row.fault is None for row in rows)


def has_columns(path: Path, columns: Mapping[str, str]) -> bool:
    """Whether a row of the file has one of the columns. Raises InvalidRows."""
    return any(name in (row.fields or {}) for row in readers.read(readers.chunks_of(path)) for name in columns.values())


def of_source(source: SourceRow) -> Row:
    """Returns the row as a report sees it. A preference row is reported on with its preferred answer."""
    try:
        return of_example(source.number, ANY_METHOD.parse(source, "training"))
    except InvalidTrainingFile as error:
        key = source.shape.columns.get("messages", "messages") if source.shape else "messages"
        return Row(source.number, tuple(_turns((source.fields or {}).get(key))), str(error.fields["reason"]))


def of_example(line: int, example: Example) -> Row:
    """Returns the row of an example that a job would take."""
    if isinstance(example, PlainText):
        return Row(line, (Turn(PLAIN, example.messages[0].content or ""),))
    rejected = _turn(example.dispreferred).text if isinstance(example, Pair) else ""
    tools = tuple(sorted(tool.function.name for tool in example.tools or ()))
    turns = tuple(map(_turn, example.messages))
    misfit = calls.describe(example) if any(turn.calls for turn in turns) else None
    return Row(line, turns, rejected=rejected, tools=tools, misfit=misfit)


def _turn(message: Message) -> Turn:
    parts = (message.reasoning_content, message.content, message.refusal)
    made = calls.of_message(message)
    said = [part for part in parts if part] + [f"{call.name}({call.arguments})" for call in made]
    return Turn(message.role, "\n".join(said), bool(made))


def _turns(messages: Any) -> Iterator[Turn]:
    """What can be read of the messages of a row that is refused."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            has_calls = bool(message.get("tool_calls") or message.get("function_call"))
            yield Turn(str(message.get("role")), _text(message.get("content")), has_calls)


def _text(content: Any) -> str:
    """Returns a content's text. What has none in a form that a job would read is not empty: it is written as JSON."""
    if isinstance(content, list):
        return "\n".join(map(_part, content))
    return "" if content is None else _part(content)


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else json.dumps(part, ensure_ascii=False, default=str)


def by_key(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    """Returns the rows grouped."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def whole(row: Row) -> str:
    """Returns a row's normalised text; rows are the same if it is equal."""
    said = [f"{turn.role}\x01{texts.squash(turn.text)}" for turn in row.turns]
    said += [f"tool\x02{name}" for name in row.tools]
    return "\x00".join([*said, texts.squash(row.rejected)] if row.rejected else said)
