"""Decodes token ids to an answer's text: whole characters up to a stop string, and the tool calls in it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from tunery.rows.calls import CallSpelling
from tunery.rows.messages import FunctionCall
from worker.server.answer import FinishReason, TokenChance

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the first bytes of a character that continues in the next token."""


def spell(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token as text, special tokens too."""
    return str(tokenizer.decode([token], skip_special_tokens=False))


class Text:
    """Decodes token ids to text that may be sent: whole characters, and nothing that could begin a stop string.

    `mark`: the beginning of a tool call, which ends the text like a stop string; special tokens are then decoded too.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: list[str], context: Sequence[int] = (), mark: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops if mark is None else [*stops, mark]
        self._mark = mark
        self.calls = False
        self._ids = list(context)
        # New tokens are decoded with those before them, since a tokenizer may drop a leading space at the start of a
        # text: ids[start:read] is that context, ids[read:] is new.
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds a token; returns the text that can be sent now, often none."""
        self._ids.append(token)
        text = self._new_text()
        if text and not text.endswith(_UNFINISHED):
            self._start, self._read = self._read, len(self._ids)
            self._held += text
        return self._release()

    def finish(self) -> str:
        """Returns the text held back, when no token follows."""
        if self.stopped:
            return ""
        self._held += self._new_text()
        self._read = self._start = len(self._ids)
        released = self._release()
        held, self._held = self._held, ""
        return released if self.stopped else released + held

    def _new_text(self) -> str:
        is_plain = self._mark is None
        context = self._tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=is_plain)
        whole = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=is_plain)
        return str(whole[len(context) :])

    def _release(self) -> str:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self.calls = self._mark is not None and self._held.startswith(self._mark, min(found))
            released, self._held = self._held[: min(found)], ""
            return released
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


@dataclass(kw_only=True, eq=False)
class WrittenAnswer(ABC):
    """An answer in progress. Iterate for its pieces (one per token, often empty); the counts grow meanwhile.

    `context`: the prompt's last tokens, with which the answer's are decoded. Tool calls in the format of `spelling` are
    not pieces: `tool_calls` has them at the end. `finish_reason` is `stop` at one of `eos_ids`, a stop string or a
    grammar's end, `tool_calls` after calls, and `length` after the last allowed token. `ids`: the tokens so far,
    including the stop token, which is counted and never shown.
    """

    tokenizer: Tokenizer
    prompt_ids: list[int]
    eos_ids: frozenset[int]
    stops: list[str] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    on_close: Callable[[], None] = lambda: None
    spelling: CallSpelling | None = None
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    chances: list[TokenChance] = field(default_factory=list)
    tool_calls: list[FunctionCall] = field(default_factory=list)

    @abstractmethod
    def tokens(self) -> Iterator[int]:
        """Yields the answer's tokens, including the stop token. Sets `finish_reason` if they end without one."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the answer holds."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Generator[str]:
        try:
            yield from self._pieces()
        finally:
            self.close()

    def _pieces(self) -> Iterator[str]:
        mark = None if self.spelling is None else self.spelling.before
        text = Text(self.tokenizer, self.stops, self.context, mark)
        said: list[int] = []
        for token in self.tokens():
            self.ids.append(token)
            if token in self.eos_ids:
                self.finish_reason = "stop"
                break
            said.append(token)
            yield "" if text.calls else text.add(token)
            if text.stopped and not text.calls:
                self.finish_reason = "stop"
                break
        if not text.stopped:
            yield text.finish()
        if text.calls:
            yield self._read_calls(said)
        is_over = text.stopped and not text.calls
        self.finish_reason = "stop" if is_over else self.finish_reason or "length"
        if self.tool_calls:
            self.finish_reason = "tool_calls"

    def _read_calls(self, said: list[int]) -> str:
        """Reads the calls at the answer's end; returns the text that began like a call if it is none."""
        assert self.spelling is not None
        text: str = self.tokenizer.decode(said, skip_special_tokens=False)
        written = text[text.index(self.spelling.before) :]
        self.tool_calls = self.spelling.read(written) or []
        return "" if self.tool_calls else written
