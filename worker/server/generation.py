"""One answer, token by token: prompt ids in, text out.

A loop of our own instead of `generate()`: it can be left after any token without a second thread, it shares its forward
passes with other answers (`Stream`), it reads no sampling defaults from the model's folder (a request says all), and a
seed is its own generator instead of the process's.
Greedy answers are the same as `generate(do_sample=False)` gives, which the tests hold.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from tunery.rows.calls import CallSpelling
from tunery.rows.messages import FunctionCall
from worker.server.answer import FinishReason, TokenChance
from worker.server.streams import Stream

if TYPE_CHECKING:
    from worker.server.grammar import Grammar

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the first bytes of a character whose last bytes are in the next token."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. `temperature` 0: the likeliest. `seed` None: a new one each time."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class Text:
    """Token ids as text that may leave the house: whole characters, and nothing that could begin a stop string.

    `mark`: what a tool call begins with, at which the text ends as at a stop string; its special tokens are then shown.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: list[str], context: Sequence[int] = (), mark: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops if mark is None else [*stops, mark]
        self._mark = mark
        self.calls = False
        self._ids = list(context)
        # Decoded together with their neighbours on the left, since a tokenizer may write a token's leading space only
        # inside a text: ids[start:read] is that context, ids[read:] is new.
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token sets free, often none."""
        self._ids.append(token)
        text = self._new_text()
        if text and not text.endswith(_UNFINISHED):
            self._start, self._read = self._read, len(self._ids)
            self._held += text
        return self._release()

    def finish(self) -> str:
        """What was held back, when no token follows."""
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
    """Length of the longest end of `text` that is a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


@dataclass
class Generation:
    """An answer in the making. Iterate for its pieces (one a token, often empty); the counts grow meanwhile.

    `context`: the prompt's last tokens, with which the answer's are decoded. Calls, where they are spelled as
    `spelling` says, are no pieces: `tool_calls` has them at the end. `chances` has each token of the answer where
    `top_logprobs` is a number, and beside it as many likeliest tokens. `finish_reason` is `stop` at one of `eos_ids`,
    a stop string or a grammar's end, `tool_calls` after calls and `length` after `max_tokens` tokens; the stop token
    is counted and never shown.
    """

    stream: Stream
    tokenizer: Tokenizer
    prompt_ids: list[int]
    max_tokens: int
    eos_ids: frozenset[int]
    stops: list[str] = field(default_factory=list)
    sampling: Sampling = Sampling()
    context: list[int] = field(default_factory=list)
    on_close: Callable[[], None] = lambda: None
    grammar: "Grammar | None" = None
    spelling: CallSpelling | None = None
    top_logprobs: int | None = None
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    chances: list[TokenChance] = field(default_factory=list)
    tool_calls: list[FunctionCall] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    def close(self) -> None:
        """Frees the stream and the model."""
        self.stream.close()
        self.on_close()

    def __iter__(self) -> Generator[str]:
        try:
            yield from self._pieces()
        finally:
            self.close()

    def _pieces(self) -> Iterator[str]:
        mark = None if self.spelling is None else self.spelling.before
        text = Text(self.tokenizer, self.stops, self.context, mark)
        said: list[int] = []
        for token in self._tokens():
            self.completion_tokens += 1
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
        is_over = (text.stopped and not text.calls) or (self.grammar is not None and self.grammar.is_complete)
        self.finish_reason = "stop" if is_over else self.finish_reason or "length"
        if self.tool_calls:
            self.finish_reason = "tool_calls"

    def _read_calls(self, said: list[int]) -> str:
        """Takes the calls at the answer's end, or gives the text back that began like one and is none."""
        assert self.spelling is not None
        text: str = self.tokenizer.decode(said, skip_special_tokens=False)
        written = text[text.index(self.spelling.before) :]
        self.tool_calls = self.spelling.read(written) or []
        return "" if self.tool_calls else written

    def _tokens(self) -> Iterator[int]:
        dice = _dice(self.sampling.seed)
        for left in reversed(range(self.max_tokens)):
            logits = self.stream.logits()
            token = choose(logits if self.grammar is None else self.grammar.allow(logits), self.sampling, dice)
            self._note(token, logits)
            if left:
                # Before the token leaves: a stream that waits for it shares the next pass with the others, where one
                # that takes it when the next piece is read would have a pass of the batch for itself.
                self.stream.push(token)
            yield token
            if self.grammar is not None:
                self.grammar.take(token)
                if self.grammar.is_complete:
                    return

    def _note(self, token: int, logits: torch.Tensor) -> None:
        """Keeps the token's log probability where it is asked for. The stop token is no token of the answer."""
        if self.top_logprobs is None or token in self.eos_ids:
            return
        every = logits.log_softmax(dim=-1)
        values, likeliest = every.topk(min(self.top_logprobs, len(every)))
        top = tuple(map(self._chance, likeliest.tolist(), values.tolist()))
        self.chances.append(replace(self._chance(token, float(every[token])), top=top))

    def _chance(self, token: int, logprob: float) -> TokenChance:
        return TokenChance(self.tokenizer.decode([token], skip_special_tokens=False), logprob)


def _dice(seed: int | None) -> torch.Generator:
    dice = torch.Generator()
    if seed is None:
        dice.seed()
    else:
        dice.manual_seed(seed % 2**63)  # torch takes 64 bits, JSON any integer
    return dice


def choose(logits: torch.Tensor, sampling: Sampling, dice: torch.Generator) -> int:
    """The next token: the likeliest at temperature 0, else drawn from the smallest set that holds `top_p` of the mass.

    Nucleus sampling as in Holtzman et al. 2020 (arXiv:1904.09751): the likeliest token is always in the set.
    """
    if sampling.temperature == 0 or sampling.top_p == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=dice)])
