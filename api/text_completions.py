"""Converts text completions: requests to those of the model server, and its chat completions to answers."""

from collections.abc import Mapping
from typing import Any

from tunery import ids
from tunery.errors import InvalidValue, Unsupported
from tunery.field_errors import unrecognized
from tunery.serving import TEXT_FIELD

Json = dict[str, Any]
MOST_PROMPTS = 128
DEFAULT_TOKENS = 16
"""OpenAI's own default of `max_tokens` here."""
_SAME = frozenset(
    {
        "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "user",
        "presence_penalty", "frequency_penalty", "logit_bias",
    }
)  # fmt: skip


def prompts(fields: Mapping[str, Any]) -> list[str]:
    """Returns the texts to continue. Raises InvalidValue, and Unsupported for tokens in place of texts."""
    given = fields["prompt"]
    texts = given if isinstance(given, list) else [given]
    if any(isinstance(text, int | list) for text in texts):
        raise Unsupported(param="prompt", what="A prompt of token ids", instead="Send a text, or a list of texts.")
    if not all(isinstance(text, str) and text for text in texts) or not 1 <= len(texts) <= MOST_PROMPTS:
        reason = f"Invalid 'prompt': send a non-empty text, or a list of 1 to {MOST_PROMPTS} of them."
        raise InvalidValue(param="prompt", reason=reason)
    return texts


def to_chat(fields: Mapping[str, Any], prompt: str) -> Json:
    """Returns the model server's fields for one prompt. Raises InvalidValue and Unsupported, each naming the field."""
    given = {name: value for name, value in fields.items() if value is not None and name != "prompt"}
    _refuse(given, "echo", (False,), "Leave it out: the answer is the text after the prompt.")
    _refuse(given, "suffix", ("",), "Leave it out.")
    _refuse(given, "best_of", (1, given.get("n", 1)), "Leave it out, and choose among 'n' answers.")
    top = given.pop("logprobs", None)
    for name in given.keys() - _SAME:
        raise unrecognized(name, _SAME | {"prompt", "logprobs"})
    chances = {} if top is None else {"logprobs": True, "top_logprobs": _top(top)}
    return {"max_tokens": DEFAULT_TOKENS, **given, **chances, TEXT_FIELD: prompt}


def _refuse(given: Json, name: str, neutral: tuple[Any, ...], instead: str) -> None:
    if given.pop(name, neutral[0]) not in neutral:
        raise Unsupported(param=name, what=f"'{name}'", instead=instead)


def _top(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 5:
        raise InvalidValue(param="logprobs", reason="Invalid 'logprobs': it must be an integer from 0 to 5.")
    return value


def of_chat(answer: Json, *, first: int = 0) -> Json:
    """Returns a chat completion, or a chunk of one, as a text completion whose choices count from `first`."""
    choices = [_choice(choice, first) for choice in answer["choices"]]
    id = ids.TEXT_COMPLETION + str(answer["id"]).removeprefix(ids.COMPLETION)
    return {**answer, "id": id, "object": "text_completion", "choices": choices}


def _choice(choice: Json, first: int) -> Json:
    said = choice.get("message") or choice.get("delta") or {}
    return {
        "text": said.get("content") or "",
        "index": first + choice["index"],
        "logprobs": _logprobs(choice.get("logprobs")),
        "finish_reason": choice["finish_reason"],
    }


def _logprobs(found: Json | None) -> Json | None:
    if found is None:
        return None
    tokens = found["content"] or []
    offsets = [sum(len(before["token"]) for before in tokens[:place]) for place in range(len(tokens))]
    return {
        "tokens": [one["token"] for one in tokens],
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in tokens],
        "text_offset": offsets,
    }


def joined(answers: list[Json]) -> Json:
    """Returns the text completions of several prompts as one."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage: Json = {name: sum(answer["usage"][name] for answer in answers) for name in names}
    cached = [(answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0) for answer in answers]
    usage["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
    return {**answers[0], "choices": [choice for answer in answers for choice in answer["choices"]], "usage": usage}
