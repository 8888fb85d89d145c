"""A back end that writes as many words as a request allows tokens, each as soon as it can be sent."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from tunery.rows.messages import FunctionCall
from worker.server.answer import Answer, FinishReason, TokenChance
from worker.server.backends import backend
from worker.server.schemas import ChatRequest


@dataclass
class Words:
    count: int
    prompt_tokens: int = 1
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    tool_calls: list[FunctionCall] = field(default_factory=list)
    chances: list[TokenChance] = field(default_factory=list)

    def __iter__(self) -> Generator[str]:
        for _ in range(self.count):
            self.completion_tokens += 1
            yield "word "
        self.finish_reason = "length"

    def close(self) -> None:
        pass


class WordsBackend:
    device = "none"
    loaded: str | None = None

    def __init__(self, streams: int) -> None:
        self.streams = streams

    def answer(self, request: ChatRequest) -> Words:
        return Words(request.max_tokens or 1)

    def advance(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        return answers


backend.BACKENDS["words"] = lambda settings, _storage, _device: WordsBackend(settings.server_streams)
