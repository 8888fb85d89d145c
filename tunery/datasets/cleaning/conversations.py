"""Corrects the order of a conversation's messages where only one order is possible."""

import json
from collections.abc import Collection, Mapping
from typing import Any, get_args

from tunery.datasets.report import texts
from tunery.datasets.report.rows import SYSTEM
from tunery.rows.conversations import ROLES
from tunery.rows.keys import by_name
from tunery.rows.messages import Role

Messages = list[dict[str, Any]]

_MORE = {"chatbot": "assistant", "agent": "assistant", "customer": "user", "client": "user", "prompter": "user"}
_KNOWN = frozenset(get_args(Role))
_SHAREGPT = {"user": "human", "assistant": "gpt"}
_KEYS = ("messages", "conversations", "conversation")


def fix(fields: dict[str, Any], answers: Collection[str], columns: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns a row's fields with its messages in order, in the file's own format; None if it has no messages.

    `answers`: the squashed answers of other rows, by which an answer before its question is recognised. `columns`: see
    `FileShape`. The caller must check whether the result is in order.
    """
    named = columns or by_name(fields)
    keys = [named[name] for name in (("messages",) if columns else _KEYS) if name in named]
    key = next((key for key in keys if isinstance(fields.get(key), list)), None)
    if key is None or not all(isinstance(message, dict) for message in fields[key]):
        return None
    speaker = "from" if any("from" in message for message in fields[key]) else "role"
    said = "value" if speaker == "from" else "content"
    turns = [
        {**message, speaker: role} for message, role in zip(fields[key], _roles(fields[key], speaker), strict=True)
    ]
    for step in (_drop_repeated, _lead_with_system, _swap_last, _trim, _join_questions):
        turns = step(turns, speaker, said, answers)
    return {**fields, key: [_spelled(turn, speaker) for turn in turns]}


def _roles(messages: Messages, speaker: str) -> list[str]:
    """Returns OpenAI's role of each message; an unknown one is inferred from the message before."""
    roles: list[str] = []
    for message in messages:
        name = str(message.get(speaker)).strip().casefold()
        role = name if name in _KNOWN else _MORE.get(name) or ROLES.get(name)
        before = roles[-1] if roles else "system"
        roles.append(role or ("assistant" if before == "user" else "user"))
    return roles


def _spelled(turn: dict[str, Any], speaker: str) -> dict[str, Any]:
    return turn if speaker == "role" else {**turn, speaker: _SHAREGPT.get(turn[speaker], turn[speaker])}


def _drop_repeated(turns: Messages, _speaker: str, _said: str, _answers: Collection[str]) -> Messages:
    """Drops a message that repeats the one before."""
    kept: Messages = []
    for turn in turns:
        if not kept or json.dumps(turn, sort_keys=True) != json.dumps(kept[-1], sort_keys=True):
            kept.append(turn)
    return kept


def _lead_with_system(turns: Messages, speaker: str, said: str, _answers: Collection[str]) -> Messages:
    """Moves all system text into one message at the beginning, as templates show no other."""
    system = [turn for turn in turns if turn[speaker] in SYSTEM]
    spoken = [turn for turn in turns if turn[speaker] not in SYSTEM]
    parts = list(dict.fromkeys(turn.get(said) for turn in system if isinstance(turn.get(said), str)))
    if len(system) < 2 or len(parts) == 0:
        return [*system, *spoken]
    return [{**system[0], said: "\n\n".join(filter(None, parts))}, *spoken]


def _swap_last(turns: Messages, speaker: str, said: str, answers: Collection[str]) -> Messages:
    """Swaps an answer with the question after it, if other rows have the same answer."""
    if [turn[speaker] for turn in turns[-2:]] != ["assistant", "user"]:
        return turns
    # Only if others have it: an assistant may greet first, and the question then lacks its answer.
    text = turns[-2].get(said)
    known = isinstance(text, str) and texts.squash(text) in answers
    return [*turns[:-2], turns[-1], turns[-2]] if known else turns


def _trim(turns: Messages, speaker: str, _said: str, _answers: Collection[str]) -> Messages:
    """Drops unanswered questions at the end and answers without a question at the beginning."""
    head = [turn for turn in turns if turn[speaker] in SYSTEM]
    spoken = turns[len(head) :]
    while spoken and spoken[-1][speaker] == "user":
        spoken.pop()
    while spoken and spoken[0][speaker] == "assistant":
        spoken.pop(0)
    return [*head, *spoken]


def _join_questions(turns: Messages, speaker: str, said: str, _answers: Collection[str]) -> Messages:
    """Joins consecutive messages of the user. Consecutive answers stay, as it is unknown which one is meant."""
    joined: Messages = []
    for turn in turns:
        parts = [one[said] for one in (*joined[-1:], turn) if isinstance(one.get(said), str)]
        if joined and turn[speaker] == joined[-1][speaker] == "user" and len(parts) == 2:
            joined[-1] = {**joined[-1], said: "\n\n".join(parts)}
        else:
            joined.append(turn)
    return joined
