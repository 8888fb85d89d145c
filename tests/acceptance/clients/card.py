"""Shared by the drivers for structured output: what they ask for, and the last line that they print."""

import json
import sys
from typing import Literal

from pydantic import BaseModel

ASK = "A red card is gone."
MODEL = sys.argv[1]


class Card(BaseModel):
    """A payment card."""

    colour: Literal["red", "blue"]
    lost: bool


def report(**found: object) -> None:
    """Prints the card that each way of asking returned, as JSON."""
    print(json.dumps({way: Card.model_validate(card).model_dump() for way, card in found.items()}))
