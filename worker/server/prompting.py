"""Encodes a request's prompt and limits its answer's length, for every back end."""

from tunery.rows.errors import PromptTooLong
from tunery.rows.template import ChatTemplate
from worker.server.schemas import ChatRequest

UNKNOWN_CONTEXT = 4096
"""The most tokens of an answer if neither the request nor the model's config limits it."""

_LONG = 16
"""Characters per token of the context. A prompt has far fewer unless most of it is whitespace."""


def encode(request: ChatRequest, template: ChatTemplate) -> list[int]:
    """Returns the prompt's tokens. Raises CannotRender."""
    if request.text is not None:
        return template.encode_beginning(request.text)
    return template.encode_prompt(request.messages, request.offered_tools)


def refuse_much_too_long(request: ChatRequest, template: ChatTemplate, limit: int | None) -> None:
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


def room(request: ChatRequest, prompt_tokens: int, context_length: int | None) -> int:
    """Returns the most tokens that the answer may have. Raises PromptTooLong if there is no room for any."""
    wanted = request.max_completion_tokens or request.max_tokens
    if context_length is None:
        return wanted or UNKNOWN_CONTEXT
    if prompt_tokens >= context_length:
        raise PromptTooLong(param="messages", limit=context_length, tokens=prompt_tokens)
    return min(wanted or context_length, context_length - prompt_tokens)
