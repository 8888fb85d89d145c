"""Builds replies in OpenAI's format: whole, and in chunks."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from tunery import ids
from worker.server.answer import Answer, TokenChance
from worker.server.schemas import ChatRequest, NamedTool


class Reply:
    """A reply in progress. Its id, time and names are the same in every chunk."""

    def __init__(self, chat: ChatRequest) -> None:
        self.chat = chat
        self._id = ids.new(ids.COMPLETION)
        self._created = int(time.time())
        self._choices: list[dict[str, Any]] = []
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0

    def add(self, index: int, answer: Answer, text: str) -> None:
        """Adds a finished answer."""
        if index == 0:  # only once: all answers have the same prompt
            self._prompt_tokens = answer.prompt_tokens
            self._cached_tokens = getattr(answer, "cached_tokens", 0)  # a back end without such a cache has no count
        self._completion_tokens += answer.completion_tokens
        called = calls_of(answer)
        message = {"role": "assistant", "content": text if text or not called else None, "refusal": None}
        self._choices.append(
            {
                "index": index,
                "message": {**message, "tool_calls": called} if called else message,
                "logprobs": self._logprobs(answer.chances),
                "finish_reason": self.reason(answer),
            }
        )

    def whole(self) -> dict[str, Any]:
        """Returns the body of a reply that is not streamed."""
        choices = sorted(self._choices, key=lambda choice: choice["index"])
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        chances: Sequence[TokenChance] = (),
    ) -> dict[str, Any]:
        """Returns a chunk of the answer with this index."""
        logprobs = self._logprobs(chances) if chances else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.chat.wants_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def usage_chunk(self) -> dict[str, Any]:
        """Returns the final chunk, which counts the tokens of all answers."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def reason(self, answer: Answer) -> str | None:
        """Returns why an answer ended. OpenAI gives `stop` for a call that was requested by name."""
        by_name = isinstance(self.chat.tool_choice, NamedTool) and answer.finish_reason == "tool_calls"
        return "stop" if by_name else answer.finish_reason

    def _head(self, object: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object,
            "created": self._created,
            "model": self.chat.model,
            # Answers with the same seed are comparable if this is the same.
            "system_fingerprint": f"fp_{self.chat.chosen.template.manifest_sha256[:10]}",
        }

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def _logprobs(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not self.chat.logprobs:
            return None
        content = [{**_chance(one), "top_logprobs": list(map(_chance, one.top))} for one in chances]
        return {"content": content, "refusal": None}


class StreamedChoice:
    """The chunks of one of a reply's answers."""

    def __init__(self, reply: Reply, index: int, answer: Answer) -> None:
        self._reply = reply
        self._index = index
        self._answer = answer
        self._has_role = False
        self._shown = 0

    def chunks(self, piece: str | None) -> Iterator[dict[str, Any]]:
        """Yields the chunks of the answer's next piece; None: those of its end."""
        reply, index, answer = self._reply, self._index, self._answer
        if not self._has_role:
            self._has_role = True
            yield reply.chunk(index, {"role": "assistant", "content": ""})
        if piece:
            known = len(answer.chances)  # read once: the loop's thread adds more while the chunk is sent
            yield reply.chunk(index, {"content": piece}, chances=answer.chances[self._shown : known])
            self._shown = known
        if piece is None:
            for place, call in enumerate(calls_of(answer)):
                yield reply.chunk(index, {"tool_calls": [{"index": place, **call}]})
            yield reply.chunk(index, {}, reply.reason(answer), answer.chances[self._shown :])


def calls_of(answer: Answer) -> list[dict[str, Any]]:
    """Returns an answer's tool calls, each with the id by which its result is sent back."""
    return [
        {"id": ids.new(ids.TOOL_CALL), "type": "function", "function": call.model_dump()} for call in answer.tool_calls
    ]


def _chance(one: TokenChance) -> dict[str, Any]:
    """Returns a token's entry. OpenAI's `bytes` is null for a token that is only part of a character."""
    spelled = None if "\N{REPLACEMENT CHARACTER}" in one.token else list(one.token.encode())
    return {"token": one.token, "logprob": one.logprob, "bytes": spelled}
