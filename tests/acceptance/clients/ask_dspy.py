"""Asks dspy's predictor with each of its adapters, at the environment's base URL: python ask_dspy.py MODEL."""

from typing import Any

import dspy
from card import ASK, MODEL, Card, report


class Read(dspy.Signature):
    """Reads what is said of a card."""

    said: str = dspy.InputField()
    card: Card = dspy.OutputField()


lm = dspy.LM(f"openai/{MODEL}", temperature=0, max_tokens=200, cache=False)
found: dict[str, Any] = {}
for name, adapter in (("chat", dspy.ChatAdapter()), ("json", dspy.JSONAdapter())):
    with dspy.context(lm=lm, adapter=adapter):
        found[name] = dspy.Predict(Read)(said=ASK).card
report(**found)
