"""Keys of rows and messages: their names, absent ones, those only in answers, and those that would change a row's
meaning."""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from tunery.rows.words import pattern

OF_AN_ANSWER = frozenset({"annotations", "audio", "parsed"})
"""Keys that the official client's `message.model_dump()` adds to those of a request; they can be ignored."""

BY_HAND = "in the job's 'columns'."
"""The end of the advice in each fault that naming the columns to read puts right."""
_OR_NAME = f"Or name the columns to read, and no others, {BY_HAND}"
_JUDGED = (
    "marks the answer as good or bad (KTO), which no method supports: a bad answer would be learned as a good one. "
    "Remove the rows with bad answers and the key, or use pairs of answers and the method 'dpo'."
)
_MAY_JUDGE = (
    "may mark the answer as good or bad (KTO), which no method supports: a bad answer would be learned as a good one. "
    f"Remove the rows with bad answers and the key. If it is a class, name the columns to read {BY_HAND}"
)
_DISAPPROVED = (
    "marks the answer as bad, which no method supports: it would be learned as a good one. Remove the rows with bad "
    "answers and the key, or use pairs of answers and the method 'dpo'."
)
_RATED = (
    "rates the answer, which no method supports: all answers would be learned equally. Remove the rows whose answers "
    "should not be learned, and the key."
)
_COMPARED = (
    "belongs to a preference row (DPO), but this row has a single answer. Remove the key, or add both the preferred "
    "and the other answer and use the method 'dpo'."
)
_WEIGHED = (
    "weights the row, but all rows have the same weight. Remove the key; an assistant message may have the 'weight' 0 "
    "(not learned from) or 1."
)
_MASKED = (
    "selects what is learned, which is not supported. Remove the key, and give assistant messages the 'weight' 0 (not "
    "learned from) or 1."
)
_PICTURED = "contains images, audio or files, but only text is supported. Remove the key, or the row."
_RENDERED = "changes how a template renders the row, which is not supported. Remove the key."
_SYSTEM = "would be ignored. Put it into 'messages' as the first message, with the role 'system', and remove the key."
_EARLIER = "would be ignored. Put the earlier turns into 'messages', before the last question."
_OFFERED = (
    "would be ignored, but the answer is the letter or number of a choice. Write the choices into the question, or "
    "remove the key if they are the same in all rows."
)

_COMPARISON = re.compile(r"(?:.*_)?(?:chosen|rejected|preferred|non_preferred)(?:_.*)?")
_MEANINGS: dict[str, tuple[str, ...]] = {
    _JUDGED: (
        *("label", "kto_tag", "kto_label", "desirable", "is_desirable", "thumbs_up", "thumbs_down"),
        *("is_good", "is_good_answer", "is_bad"),
    ),
    _DISAPPROVED: (
        *("labels", "good", "feedback", "user_feedback", "correct", "is_correct", "accepted", "is_accepted"),
        *("approved", "is_approved", "helpful", "is_helpful", "liked", "vote", "verdict", "judgement", "judgment"),
    ),
    _RATED: ("score", "scores", "rating", "ratings", "reward", "rewards", "advantage", "advantages"),
    _COMPARED: ("preference", "margin"),
    _WEIGHED: ("weight", "weights", "sample_weight", "example_weight", "importance_weight"),
    _MASKED: ("loss_mask", "train_mask", "assistant_masks", "completion_mask", "train_on_inputs", "loss_weight"),
    _PICTURED: (
        *("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios", "file", "files"),
        *("pixel_values", "attachments"),
    ),
    _RENDERED: (
        *("chat_template", "chat_template_kwargs", "template_kwargs", "documents", "enable_thinking"),
        *("add_generation_prompt", "continue_final_message"),
    ),
    _SYSTEM: ("system", "system_prompt", "system_message"),
    _EARLIER: ("history",),
    _OFFERED: ("choices", "options", "answer_choices", "answer_options", "alternatives", "endings", "candidates"),
}
_BAD = frozenset(
    {"false", "no", "n", "bad", "wrong", "incorrect", "negative", "thumbs_down", "thumbs down", "down", "👎"}
)
_BAD_NUMBERS = ("0", "-1", "0.0", "-1.0")
_GOOD = frozenset({"yes", "y", "good", "right", "correct", "positive", "up", "1", "1.0"})
_JUDGEMENTS = frozenset(
    {"true", "false", "desirable", "undesirable", "thumbs_up", "thumbs_down", "thumbs up", "thumbs down", "👍", "👎"}
)
"""Values of a `label` that judge an answer; those in _BAD and _GOOD may be classes, any other is one."""
_CHOICE = re.compile(r"\s*\(?([A-Ja-j]|\d{1,2})\)?[.:]?\s*")
_CHOICE_COLUMN = re.compile(r"(?:option|choice|answer|op)_?(?:[a-j]|\d)|[a-j]")
"""The name of a column with a single choice."""
_WORD = re.compile(pattern())
_LONGEST_NAME = 40
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_GAP = re.compile(r"[\s-]+")
_MEANING = {key: meaning for meaning, keys in _MEANINGS.items() for key in keys}
_HINTS = {
    **dict.fromkeys(
        ("train", "training", "trainable", "loss", "loss_weight", "loss_scale", "loss_mask", "mask", "masked"),
        "To exclude a message from training, give it the 'weight' 0",
    ),
    **dict.fromkeys(
        ("reasoning", "thinking", "thoughts"), "Reasoning before the answer belongs in 'reasoning_content'"
    ),
    **dict.fromkeys(_MEANINGS[_PICTURED], "Only text is supported here: remove the message, or describe it in words"),
    **dict.fromkeys(("value", "text", "message"), "A message's text belongs in 'content'"),
    "from": "A message's speaker belongs in 'role'",
}


def present(value: Any, ignored: Collection[str] = ()) -> Any:
    """Returns an object without null keys, which count as absent, and `ignored` ones; any other value unchanged."""
    if type(value) is dict and None not in value.values() and value.keys().isdisjoint(ignored):
        return value.copy()
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if item is not None and key not in ignored}


def name(key: str) -> str:
    """Returns a key's name, which is the same in any case and with any separator of words: `is_desirable` also for
    "IsDesirable" and "Is desirable"."""
    return _name(key) if len(key) <= _LONGEST_NAME else key  # a cache of long keys would take too much memory


@lru_cache(1024)
def _name(key: str) -> str:
    return _GAP.sub("_", _HUMP.sub("_", key.strip())).casefold()


def by_name(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row's keys by their names."""
    return {name(key): key for key in row}


def compares(key: str) -> bool:
    """Whether the key belongs to a preference between two answers."""
    return _COMPARISON.fullmatch(name(key)) is not None


def has_meaning(known: str) -> bool:
    """Whether a key of this name would change a row's meaning if it were ignored."""
    return known in _MEANING


def find_meaning(row: Mapping[str, Any], *, of_a_pair: bool = False) -> str | None:
    """Returns the first key of a row that would change its meaning if it were ignored, and what to do about it.

    `of_a_pair`: the row is a preference row, where a rating of its answers or a margin between them is not needed.
    """
    for key, value in row.items():
        meaning = _meaning_of(key) if len(key) <= _LONGEST_NAME else None
        if meaning == _JUDGED and name(key) == "label":
            meaning = _judgement(value)
        if meaning is None or (of_a_pair and meaning == _COMPARED) or _is_empty(value):
            continue
        if (meaning == _SYSTEM and _is_repeated(row, value)) or (meaning == _DISAPPROVED and not _is_bad(key, value)):
            continue
        if meaning == _OFFERED and not _lacks_choices(row, key, value):
            continue
        can_be_named = not of_a_pair and meaning not in (_JUDGED, _MAY_JUDGE, _DISAPPROVED)
        return f"has the key '{key}', which {meaning}" + (f" {_OR_NAME}" if can_be_named else "")
    return None


@lru_cache(1024)
def _meaning_of(key: str) -> str | None:
    if compares(key):
        return _COMPARED
    known = name(key)
    return _OFFERED if _CHOICE_COLUMN.fullmatch(known) else _MEANING.get(known)


def _judgement(value: Any) -> str | None:
    """Returns the meaning of the `label` beside an answer; None if it is the answer's class."""
    said = _said(value)
    if said in _JUDGEMENTS:
        return _JUDGED
    is_rating = isinstance(value, float) and not value.is_integer()
    return _MAY_JUDGE if is_rating or said in {*_BAD, *_BAD_NUMBERS, *_GOOD} else None


def _said(value: Any) -> str:
    return str(value).strip().casefold() if isinstance(value, str | int | float) else ""


def _is_bad(key: str, value: Any) -> bool:
    """Whether the value disapproves of an answer. The number of a class may be 0."""
    said = _said(value)
    return said in _BAD or (said in _BAD_NUMBERS and name(key) != "labels")


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _is_repeated(row: Mapping[str, Any], text: Any) -> bool:
    """Whether the conversation begins with the system message that a separate column repeats."""
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, Mapping) or first.get("role") not in ("system", "developer"):
        return False
    return is_same(first.get("content"), text)


def _lacks_choices(row: Mapping[str, Any], key: str, offered: Any) -> bool:
    """Whether the answer is the letter or number of a choice that the conversation does not show."""
    messages = row.get("messages")
    turns = messages if isinstance(messages, list) else []
    *shown, answer = [str(turn.get("content")) for turn in turns if isinstance(turn, Mapping)] or [""]
    if not isinstance(offered, str | list | Mapping) or (named := _CHOICE.fullmatch(answer)) is None:
        return False
    if len(name(key)) == 1 and name(key) != named[1].casefold():
        return False
    return not _words(str(offered)) <= _words("\n".join(shown))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


def is_same(one: Any, other: Any) -> bool:
    """Whether two texts differ at most in the blanks around them."""
    return one == other or (isinstance(one, str) and isinstance(other, str) and one.strip() == other.strip())


def hint(key: str) -> str:
    """Returns what to do about an unknown key of a message."""
    return f"{_HINTS[known]}." if (known := name(key)) in _HINTS else "Remove it."


_NEEDED = (
    "A pair has 'input', 'preferred_output' and 'non_preferred_output', or 'prompt', 'chosen' and 'rejected', or "
    "'chosen' and 'rejected' as whole conversations."
)
PREFERENCE = (
    "Unexpected file format: this is a preference row (DPO), but the job's method learns from a single answer. Use the "
    "method 'dpo' (method.type), or send chat rows with 'messages', for instance the preferred answers."
)
NO_PREFERENCE = (
    "Unexpected file format: this is not a preference row, but the method 'dpo' learns from pairs of answers. Use the "
    f"method 'supervised' (method.type) for rows with one answer. {_NEEDED}"
)
HALF_A_PAIR = (
    f"Unexpected file format: this is a preference row (DPO) without one of its two answers. {_NEEDED} To learn from "
    f"the one answer, name it as the completion {BY_HAND}"
)
