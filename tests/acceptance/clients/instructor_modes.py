"""Asks for a card in each of the given modes of instructor, at the environment's base URL."""

from typing import Any

import instructor
from card import ASK, MODEL, Card
from instructor import Mode
from openai import OpenAI


def ask(*modes: Mode, response_model: Any = Card) -> dict[str, Any]:
    """Returns the result of each mode by the mode's name in lower case."""
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": ASK}], "temperature": 0}
    found: dict[str, Any] = {}
    for mode in modes:
        client = instructor.from_openai(OpenAI(), mode=mode)
        found[mode.name.lower()] = client.chat.completions.create(response_model=response_model, max_retries=0, **asked)
    return found
