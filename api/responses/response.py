"""Converts a chat completion to a response of the Responses API: whole, or as the events of a stream."""

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from tunery import ids

_ECHOED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "temperature": 1.0,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1.0,
    "truncation": "disabled", "user": None,
}  # fmt: skip
"""The request's fields that a response repeats, with their defaults."""
Json = dict[str, Any]


class Response:
    """Builds a response. `asked`: the request's fields."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        given = {name: asked[name] for name in _ECHOED if asked.get(name) is not None}
        tools = [{"strict": None, "parameters": None, **tool} for tool in given.pop("tools", [])]
        self._head = {
            "id": ids.new(ids.RESPONSE),
            "object": "response",
            "created_at": int(time.time()),
            "model": asked["model"],
            "error": None,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            **_ECHOED,
            **given,
            "tools": tools,
        }

    @property
    def id(self) -> str:
        return str(self._head["id"])

    def shown(self, status: str, output: list[Json], usage: Json | None = None, reason: str | None = None) -> Json:
        """Returns the response's body. `usage`: a chat completion's."""
        cut = {"reason": "max_output_tokens"} if reason == "length" else None
        return {
            **self._head,
            "status": "incomplete" if cut else status,
            "incomplete_details": cut,
            "output": output,
            "usage": usage and _usage(usage),
        }

    def of_completion(self, completion: Json) -> Json:
        """Returns the body of a chat completion that has ended."""
        [choice] = completion["choices"]
        message = choice["message"]
        output = []
        if message["content"] is not None:
            output.append(text_item(ids.new(ids.MESSAGE), message["content"], _chances(choice)))
        output += [call_item(call) for call in message.get("tool_calls", [])]
        return self.shown("completed", output, completion.get("usage"), choice["finish_reason"])


def text_item(id: str, text: str | None, chances: list[Json]) -> Json:
    """Returns a message of the output; `text` None: it has only begun."""
    content = [] if text is None else [_part(text, chances)]
    status = "in_progress" if text is None else "completed"
    return {"id": id, "type": "message", "role": "assistant", "status": status, "content": content}


def call_item(call: Json, *, is_begun: bool = False) -> Json:
    """Returns a function call of the output, or its beginning without arguments."""
    function = call["function"]
    return {
        "id": ids.FUNCTION_CALL + call["id"].removeprefix(ids.TOOL_CALL),
        "type": "function_call",
        "call_id": call["id"],
        "name": function["name"],
        "arguments": "" if is_begun else function["arguments"],
        "status": "in_progress" if is_begun else "completed",
    }


class Events:
    """Makes the numbered events of a stream from a chat completion's chunks."""

    def __init__(self, response: Response) -> None:
        self._response = response
        self._number = 0
        self._output: list[Json] = []
        self._id = ids.new(ids.MESSAGE)
        self._text: list[str] = []
        self._chances: list[Json] = []
        self._is_writing = False
        self._reason: str | None = None
        self._usage: Json | None = None

    async def of(self, chunks: AsyncIterator[Json]) -> AsyncIterator[str]:
        """Yields server-sent events. A chunk may be an error's envelope, which ends them."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response.shown("in_progress", []))
        async for chunk in chunks:
            if "error" in chunk:
                error = {name: chunk["error"][name] for name in ("message", "code", "param")}
                yield self._event("error", **error)
                return
            for event in self._of_chunk(chunk):
                yield event
        for event in self._end_text():
            yield event
        ended = self._response.shown("completed", self._output, self._usage, self._reason)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _of_chunk(self, chunk: Json) -> Iterator[str]:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            self._reason = choice["finish_reason"] or self._reason
            if text := choice["delta"].get("content"):
                yield from self._begin_text()
                yield from self._add(text, _chances(choice))
            for call in choice["delta"].get("tool_calls", []):
                yield from self._end_text()
                yield from self._call(call)

    def _begin_text(self) -> Iterator[str]:
        if not self._is_writing:
            self._is_writing = True
            yield self._event("response.output_item.added", output_index=0, item=text_item(self._id, None, []))
            yield self._event("response.content_part.added", **self._place, part=_part("", []))

    def _add(self, text: str, chances: list[Json]) -> Iterator[str]:
        self._text.append(text)
        self._chances += chances
        yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=chances)

    def _end_text(self) -> Iterator[str]:
        if not self._is_writing:
            return
        self._is_writing = False
        text = "".join(self._text)
        item = text_item(self._id, text, self._chances)
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=self._chances)
        yield self._event("response.content_part.done", **self._place, part=_part(text, self._chances))
        yield self._event("response.output_item.done", output_index=0, item=item)
        self._output.append(item)

    def _call(self, call: Json) -> Iterator[str]:
        item, index = call_item(call), len(self._output)
        place = {"item_id": item["id"], "output_index": index}
        said = item["arguments"]
        begun = call_item(call, is_begun=True)
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=said)
        yield self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=said)
        yield self._event("response.output_item.done", output_index=index, item=item)
        self._output.append(item)

    @property
    def _place(self) -> Json:
        return {"item_id": self._id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> str:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(body)}\n\n"


def _part(text: str, chances: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": chances}


def _chances(choice: Json) -> list[Json]:
    """Returns the log probabilities of a choice's tokens. A list here: `bytes` is never null in this dialect."""
    found = (choice.get("logprobs") or {}).get("content") or []
    return [_with_bytes(one) | {"top_logprobs": list(map(_with_bytes, one["top_logprobs"]))} for one in found]


def _with_bytes(one: Json) -> Json:
    return {"token": one["token"], "logprob": one["logprob"], "bytes": one["bytes"] or []}


def _details(usage: Json) -> Json:
    """Returns the cached tokens; none for a back end that does not count them."""
    return {"cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)}


def _usage(usage: Json) -> Json:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**_details(usage), "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
