"""One answer, token by token: prompt ids in, text out.

A loop of our own instead of `generate()`: it can be left after any token without a second thread, it reads no sampling
defaults from the model's folder (a request says all), and a seed is its own generator instead of the process's.
Greedy answers are the same as `generate(do_sample=False)` gives, which the tests hold.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from worker.trainer.rope import LengthRope

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the first bytes of a character whose last bytes are in the next token."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. `temperature` 0: the likeliest. `seed` None: a new one each time."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class Text:
    """Token ids as text that may leave the house: whole characters, and nothing that could begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str], context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
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
        context = self._tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=True)
        whole = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)
        return str(whole[len(context) :])

    def _release(self) -> str:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
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

    `context`: the prompt's last tokens, with which the answer's are decoded. `finish_reason` is `stop` at one of
    `eos_ids` or a stop string and `length` after `max_tokens` tokens; the stop token is counted and never shown.
    """

    model: Any
    tokenizer: Tokenizer
    prompt_ids: list[int]
    max_tokens: int
    eos_ids: frozenset[int]
    stops: list[str] = field(default_factory=list)
    sampling: Sampling = Sampling()
    context: list[int] = field(default_factory=list)
    rope: LengthRope = field(default_factory=LengthRope)
    completion_tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    def __iter__(self) -> Generator[str]:
        text = Text(self.tokenizer, self.stops, self.context)
        for token in self._tokens():
            self.completion_tokens += 1
            if token in self.eos_ids:
                self.finish_reason = "stop"
                break
            yield text.add(token)
            if text.stopped:
                self.finish_reason = "stop"
                break
        yield text.finish()
        self.finish_reason = "stop" if text.stopped else self.finish_reason or "length"

    def _tokens(self) -> Iterator[int]:
        dice = _dice(self.sampling.seed)
        seen, cache = list(self.prompt_ids), None
        ids = seen
        for _ in range(self.max_tokens):
            logits, cache = self._forward(ids, cache)
            token = choose(logits, self.sampling, dice)
            yield token
            seen.append(token)
            ids = [token]
            if self.rope.changes(len(seen) - 1, len(seen)):
                ids, cache = seen, None  # the cache's keys were turned by other frequencies

    # Here and not around the loop: the mode belongs to a thread, and a generator may go on in another one.
    @torch.inference_mode()
    def _forward(self, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits of the next token (vocabulary, fp32, on the CPU) and the key-value cache that has seen `ids`."""
        batch = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().cpu(), out.past_key_values


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
