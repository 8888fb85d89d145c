"""Prepares a request's prompt, and what limits and decodes its answer, for every back end."""

from dataclasses import dataclass

from tunery.rows.calls import CallSpelling
from tunery.rows.errors import PromptTooLong
from tunery.rows.template import ChatTemplate
from worker.server.rendering import Rendering
from worker.server.sampling import Sampling
from worker.server.schemas import ChatRequest

UNKNOWN_CONTEXT = 4096
"""The most tokens of an answer if neither the request nor the model's config limits it."""

_LONG = 16
"""Characters per token of the context. A prompt has far fewer unless most of it is whitespace."""


@dataclass(frozen=True)
class Prepared:
    """A request as a back end answers it. `top_logprobs`: how many likeliest tokens have log probabilities shown; None
    if none are requested, not even the answer's own.
    """

    rendering: Rendering
    ids: list[int]
    stops: list[str]
    max_tokens: int
    sampling: Sampling
    top_logprobs: int | None
    spelling: CallSpelling | None

    @property
    def context(self) -> list[int]:
        """The prompt's last tokens, with which the answer's are decoded."""
        return self.rendering.template.answer_context(self.ids)


def prepare(request: ChatRequest, rendering: Rendering, context_length: int | None) -> Prepared:
    """Encodes the prompt. Raises CannotRender, PromptTooLong."""
    template = rendering.template
    _refuse_much_too_long(request, template, context_length)
    ids = _encode(request, template)
    return Prepared(
        rendering=rendering,
        ids=ids,
        stops=request.stops,
        max_tokens=_room(request, len(ids), context_length),
        sampling=Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
        ),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        spelling=rendering.spelling if request.offered_tools else None,
    )


def _encode(request: ChatRequest, template: ChatTemplate) -> list[int]:
    """Returns the prompt's tokens. Raises CannotRender."""
    if request.text is not None:
        return template.encode_beginning(request.text)
    return template.encode_prompt(request.messages, request.offered_tools)


def _refuse_much_too_long(request: ChatRequest, template: ChatTemplate, limit: int | None) -> None:
    """Raises PromptTooLong if a prompt's beginning alone is too long: tokenising millions of words takes as many
    seconds, during which nobody else is answered.
    """
    length = len(request.text or "") + sum(len(message.content or "") for message in request.messages)
    if limit is None or length <= _LONG * limit:
        return
    text = request.text or template.render(request.messages, request.offered_tools, add_generation_prompt=True)
    tokens = len(template.tokenizer.encode(text[: _LONG * limit], add_special_tokens=False).ids)
    if tokens - _LONG > limit:  # the cut may have split the last word into a few more
        raise PromptTooLong(param="messages", limit=limit, tokens=f"more than {tokens - _LONG}")


def _room(request: ChatRequest, prompt_tokens: int, context_length: int | None) -> int:
    """Returns the most tokens that the answer may have. Raises PromptTooLong if there is no room for any."""
    wanted = request.max_completion_tokens or request.max_tokens
    if context_length is None:
        return wanted or UNKNOWN_CONTEXT
    if prompt_tokens >= context_length:
        raise PromptTooLong(param="messages", limit=context_length, tokens=prompt_tokens)
    return min(wanted or context_length, context_length - prompt_tokens)
