"""A request's prompt as token ids, and how long its answer may be, whichever back end writes it."""

from tunery.rows.errors import PromptTooLong
from tunery.rows.template import ChatTemplate
from worker.server.schemas import ChatRequest

UNKNOWN_CONTEXT = 4096
"""The most tokens of an answer, unless the request says, where the model's config names no context length."""

_LONG = 16
"""Characters a token of the context, of which a prompt has far fewer unless most of it is blank."""


def encode(request: ChatRequest, template: ChatTemplate) -> list[int]:
    """Returns the prompt's tokens. Raises CannotRender."""
    if request.text is not None:
        return template.encode_beginning(request.text)
    return template.encode_prompt(request.messages, request.offered_tools)


def refuse_much_too_long(request: ChatRequest, template: ChatTemplate, limit: int | None) -> None:
    """Raises PromptTooLong for a prompt that is known to be by its beginning: millions of words take as many seconds to
    tokenise, for which nobody else is answered."""
    length = len(request.text or "") + sum(len(message.content or "") for message in request.messages)
    if limit is None or length <= _LONG * limit:
        return
    text = request.text or template.render(request.messages, request.offered_tools, add_generation_prompt=True)
    tokens = len(template.tokenizer.encode(text[: _LONG * limit], add_special_tokens=False).ids)
    if tokens - _LONG > limit:  # the cut may have made a few more of the last word
        raise PromptTooLong(param="messages", limit=limit, tokens=f"more than {tokens - _LONG}")


def room(request: ChatRequest, prompt_tokens: int, context_length: int | None) -> int:
    """Returns the most tokens that the answer may have. Raises PromptTooLong when that would be none."""
    wanted = request.max_completion_tokens or request.max_tokens
    if context_length is None:
        return wanted or UNKNOWN_CONTEXT
    if prompt_tokens >= context_length:
        raise PromptTooLong(param="messages", limit=context_length, tokens=prompt_tokens)
    return min(wanted or context_length, context_length - prompt_tokens)
