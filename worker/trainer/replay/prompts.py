"""The shipped prompts of replay, none of which the general benchmark measures with. NOTICE says where they are from."""

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
    """Messages that end with a user's, and the ids by which the base is asked them."""

    messages: tuple[Message, ...]
    ids: list[int]


def load(template: ChatTemplate, longest: int) -> list[Prompt]:
    """The prompts in the file's order, which is shuffled. Left out: what the template refuses or `longest` tokens do
    not hold."""
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
    """Equal for the same ids in the same order, whatever the template is."""
    return hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
