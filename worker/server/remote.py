"""An answer whose tokens are chosen by a remote engine and received over the network."""

from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from threading import Condition
from typing import Any

from pydantic_core import from_json
from tokenizers import Tokenizer

from tunery.errors import InvalidValue, TuneryError, Unavailable
from worker.server.answer import TokenChance
from worker.server.text import WrittenAnswer, spell

_DATA = b"data: "
_END = b"[DONE]"


@dataclass(frozen=True)
class Step:
    """A token, and its log probability if requested."""

    token: int
    chance: TokenChance | None = None


class Tokens:
    """A queue of steps from the thread that reads them to the one that writes the answer."""

    def __init__(self, arrived: Condition) -> None:
        """`arrived` is notified at each step and at the end."""
        self._arrived = arrived
        self._steps: deque[Step] = deque()
        self._error: Exception | None = None
        self._is_over = False

    @property
    def is_ready(self) -> bool:
        """Whether a step, an error or the end can be taken without waiting."""
        return bool(self._steps) or self._is_over

    def put(self, step: Step) -> None:
        with self._arrived:
            self._steps.append(step)
            self._arrived.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """Ends the steps; only the first call has an effect."""
        with self._arrived:
            if not self._is_over:
                self._error = error
                self._is_over = True
                self._arrived.notify_all()

    def __iter__(self) -> Iterator[Step]:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self.is_ready)
                if not self._steps:
                    break
                step = self._steps.popleft()
            yield step
        if self._error is not None:
            raise self._error


@dataclass(kw_only=True, eq=False)
class RemoteAnswer(WrittenAnswer):
    """An answer that is read from `source`. `on_close` stops the engine."""

    source: Tokens

    @property
    def is_ready(self) -> bool:
        """Whether the next piece can be read without waiting."""
        return self.finish_reason is not None or self.source.is_ready

    def tokens(self) -> Iterator[int]:
        """Yields the answer's tokens, including the stop token."""
        for step in self.source:
            if step.chance is not None and step.token not in self.eos_ids:
                self.chances.append(step.chance)
            yield step.token

    def close(self) -> None:
        """Stops the engine."""
        self.on_close()


class Reader:
    """Reads the chunks of vLLM's completion; `top`: how many likeliest tokens have log probabilities shown."""

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, top: int | None) -> None:
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._top = top

    async def read(self, parts: AsyncIterator[bytes]) -> None:
        """Queues the steps of a stream of server-sent events. Raises Unavailable if it breaks off, InvalidValue for
        errors that vLLM finds in the request.
        """
        rest = b""
        async for part in parts:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(_DATA) and self._take(line.removeprefix(_DATA).strip()):
                    return
        raise Unavailable(part="The model server")

    def _take(self, event: bytes) -> bool:
        """Queues the steps of an event; returns whether it was the last one."""
        if event == _END:
            return True
        chunk = from_json(event)
        if "error" in chunk:
            raise _error(chunk["error"])
        for choice in chunk["choices"]:
            for step in self._steps(choice):
                self._tokens.put(step)
            if choice.get("finish_reason") is not None:
                return True
        return False

    def _steps(self, choice: dict[str, Any]) -> Iterator[Step]:
        ids = choice.get("token_ids") or ()
        if self._top is None:
            yield from map(Step, ids)
            return
        logprobs = choice["logprobs"]
        for token, logprob, likeliest in zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            ranked = sorted(likeliest.items(), key=lambda item: -item[1])[: self._top]
            top = tuple(self._chance(_id_of(name), value) for name, value in ranked)
            yield Step(token, TokenChance(spell(self._tokenizer, token), logprob, top))

    def _chance(self, token: int, logprob: float) -> TokenChance:
        return TokenChance(spell(self._tokenizer, token), logprob)


def _error(error: dict[str, Any]) -> TuneryError:
    """Returns the error of a stream's event, such as a schema that cannot be compiled: the status line was sent before
    it.
    """
    if error.get("code") == 400:
        return InvalidValue(reason=str(error.get("message")))
    return Unavailable(part="The model server")


def _id_of(name: str) -> int:
    """Returns a token's id from its name: vLLM writes `token_id:17` if asked for ids."""
    return int(name.rpartition(":")[2])
