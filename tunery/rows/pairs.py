"""Shapes of preference rows: a prompt, the answer that is preferred to another, and that other one.

`convert` gives the messages of the prompt and the preferred answer, and `dispreferred`, the other answer's message.
"""

import json
from collections.abc import Mapping
from typing import Any

from tunery.rows import conversations, keys, strict_json
from tunery.rows.shape import SYSTEMS, Shape, as_given, begins_with_system, prompt_turns, text_message

_OUTPUTS = (("preferred_output", "non_preferred_output"), ("preferred_completion", "non_preferred_completion"))
OPENAI = "/".join(_OUTPUTS[0])
"""Name of the shape of OpenAI's preference rows."""
_CHOSEN = ("chosen", "rejected")
_PROMPTS = ("prompt", "instruction", "question", "query", "messages", "conversations", "conversation")
_BESIDE = {
    "user": _PROMPTS,
    "system": SYSTEMS,
    "context": ("context",),
    "history": ("history",),
    "input": ("input",),
}


class PairShape(Shape):
    """A shape with a `request`, or the parts of a prompt, and both answers: `preferred`, `dispreferred`."""

    def convert(self, row: dict[str, Any], used: Mapping[str, str]) -> dict[str, Any]:
        rest = {key: value for key, value in row.items() if key not in used.values()}
        parts = {part: row[key] for part, key in used.items()}
        both = [_said(parts[side], used[side]) for side in ("preferred", "dispreferred")]
        names = (used["preferred"], used["dispreferred"])
        if "request" in parts:
            asked = _request(parts["request"])
            prompt, rest = as_given(asked.pop("messages")), {**rest, **asked}
        elif all(said and _role(said[0]) != "assistant" for said in both):
            prompt, both = _in_common(both, names, parts, used)
        else:
            prompt = _prompt(parts, used)
        answers = [_answer(said, name) for said, name in zip(both, names, strict=True)]
        _check_prompt(prompt)
        return {**rest, "messages": [*prompt, answers[0]], "dispreferred": answers[1]}


def detect(row: Mapping[str, Any]) -> PairShape | None:
    """Returns the shape of a preference row; None if one of the two answers is missing. Raises ValueError."""
    named = keys.by_name(row)
    for both in (*_OUTPUTS, _CHOSEN):
        if not named.keys() >= set(both):
            continue
        answers = {"preferred": named[both[0]], "dispreferred": named[both[1]]}
        if both == _CHOSEN:
            return PairShape("/".join(both), answers, _BESIDE)
        if "input" not in named:
            raise ValueError(f"'input' is missing beside '{both[0]}'. Add the conversation before the answer.")
        return PairShape("/".join(both), {"request": named["input"], **answers})
    return None


def _request(value: Any) -> dict[str, Any]:
    """Returns the messages and tools of OpenAI's `input`."""
    value = conversations.decoded(value, "input")
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        reason = "'input' must be an object with 'messages', the conversation before the answer."
        raise ValueError(reason)  # noqa: TRY004 (to callers every fault of a row is one kind)
    return dict(value)


def _said(value: Any, key: str) -> list[Any]:
    """Returns an answer, or a conversation that ends with one, as messages."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [text_message("assistant", value, key)]
    return list(conversations.convert(value, key)) if conversations.is_sharegpt(value) else value


def _in_common(
    both: list[list[Any]], names: tuple[str, str], parts: Mapping[str, Any], used: Mapping[str, str]
) -> tuple[list[Any], list[list[Any]]]:
    """Returns the messages that two conversations share, which a prompt column may repeat, and their last messages."""
    prompt, other = both[0][:-1], both[1][:-1]
    if prompt != other:
        raise ValueError(
            f"'{names[0]}' and '{names[1]}' must have the same messages but for the last, the answer. Correct the row."
        )
    texts = {_key(message.get("content")) for message in prompt if isinstance(message, dict)}
    asked = parts.get("user", [])
    repeated = [turn.get("content") for turn in asked if isinstance(turn, dict)] if isinstance(asked, list) else [asked]
    if any(_key(text) not in texts for text in repeated if not _is_last(text, both)):
        raise ValueError(
            f"'{used['user']}' would be ignored: it is not a message of '{names[0]}'. Put it there, or remove the key."
        )
    if "system" in parts:
        prompt = prompt_turns({**parts, "user": prompt}, {"user": names[0], **used})
    return as_given(prompt), [said[-1:] for said in both]


def _key(content: Any) -> str:
    """Returns what contents have in common if they are equal."""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)


def _is_last(text: Any, both: list[list[Any]]) -> bool:
    """Whether the text equals one of the last messages, as in a column that repeats the preferred conversation."""
    return any(isinstance(said[-1], dict) and said[-1].get("content") == text for said in both)


def _prompt(parts: Mapping[str, Any], used: Mapping[str, str]) -> list[Any]:
    asked, parts = parts.get("user", parts.get("input")), dict(parts)
    if asked is None:
        raise ValueError("There is no prompt: add 'prompt', or begin 'chosen' and 'rejected' with the user's message.")
    if "user" not in parts:
        parts.pop("input")
    if isinstance(asked, list) and conversations.is_sharegpt(asked):
        asked = conversations.convert(asked, used.get("user", "input"))
    return prompt_turns({**parts, "user": asked}, {"user": "input", **used})


def _answer(said: list[Any], name: str) -> Any:
    """Returns the single message of an answer. Raises ValueError."""
    if not said:
        raise ValueError(f"'{name}' is empty. Give it one assistant message.")
    if len(said) > 1:
        reason = f"'{name}' must be one assistant message, not {len(said)}. Put the earlier ones into the prompt."
        raise ValueError(reason)
    if _role(said[0]) != "assistant":
        raise ValueError(f"'{name}' must be a message with the role 'assistant'.")
    if said[0].get("weight") == 0:
        raise ValueError(f"'{name}' has the weight 0, but both answers are compared. Remove the weight.")
    return said[0]


def _check_prompt(prompt: list[Any]) -> None:
    if not prompt or (len(prompt) == 1 and begins_with_system(prompt)):
        raise ValueError("The prompt has no message to answer. Add a user message.")
    if _role(prompt[-1]) == "assistant":
        raise ValueError("The prompt ends with an assistant message. End it with the message to answer.")


def _role(message: Any) -> Any:
    if not isinstance(message, dict):
        raise ValueError(f"A message must be an object, not {strict_json.kind(message)}.")  # noqa: TRY004 (one kind)
    return message.get("role")
