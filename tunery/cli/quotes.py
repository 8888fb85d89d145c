"""What a job is quoted and what it took, in lines for people."""

from collections.abc import Mapping
from typing import Any

from tunery.local.terminal import duration
from tunery.planning import prices


def fields(job: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the quote, what it is made of, and what the run took."""
    quote, actual = job.get("quote"), job.get("actual")
    found = [] if quote is None else [("quoted", _range(quote)), ("quoted from", quote["basis"])]
    return found if actual is None else [*found, ("took", _actual(actual))]


def _range(quote: Mapping[str, Any]) -> str:
    """`1:12 (1:01 to 1:27), 0.02 GPU hours, 0.09 USD (0.08 to 0.11) on NVIDIA H200`"""
    low, expected, high = (duration(quote["seconds"][name]) for name in ("low", "expected", "high"))
    hours = f", {quote['gpu_hours']['expected']:.2f} GPU hours" if quote["gpus"] else ""
    money = ""
    if quote["cost"] is not None:
        least, cost, most = (prices.say(quote["cost"][name]) for name in ("low", "expected", "high"))
        money = f", {cost} {quote['currency']} ({least} to {most})"
    devices = f"{quote['gpus']} x {quote['device']}" if quote["gpus"] > 1 else quote["device"]
    return f"{expected} ({low} to {high}){hours}{money} on {devices}"


def _actual(actual: Mapping[str, Any]) -> str:
    hours = f", {actual['gpu_hours']:.2f} GPU hours" if actual["gpus"] else ""
    money = "" if actual["cost"] is None else f", {prices.say(actual['cost'])} {actual['currency']}"
    apart = "" if actual["of_quoted"] is None else f": {actual['of_quoted']:.2f} times the quote"
    return f"{duration(actual['seconds'])}{hours}{money}{apart}"
