"""Loads the shipped prompts of replay, none of which the general benchmark uses. NOTICE names their sources."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import TuneryError
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate

PROMPTS = Path(__file__).parent / "data" / "prompts.jsonl"
_LONGEST = 512


@dataclass(frozen=True)
class Prompt:
    """Messages, the last a user's, and their ids as a prompt."""

    messages: tuple[Message, ...]
    ids: list[int]


def load(template: ChatTemplate, longest: int) -> list[Prompt]:
    """Returns the prompts in the file's order, which is shuffled, without those that the template refuses or that
    exceed `longest` tokens.
    """
    found = []
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        messages = tuple(Message.model_validate(message) for message in json.loads(line)["messages"])
        try:
            ids = template.encode_prompt(messages)
        except TuneryError:
            continue
        if len(ids) <= min(longest, _LONGEST):
            found.append(Prompt(messages, ids))
    return found


def digest(prompts: list[Prompt]) -> str:
    """Returns a digest of the ids and their order, whatever the template."""
    return hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
