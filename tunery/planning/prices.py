"""The cost of a device, by the operator's hourly prices or, where none is set, the default ones of `cards.CARDS`."""

from collections.abc import Mapping
from typing import Protocol

from tunery.planning import cards

HOUR = 3600


class Prices(Protocol):
    """The price settings. Keys of `gpu_hour_prices` are words of a device's name: `H200`, `A100 40GB`, `CPU`."""

    @property
    def gpu_hour_prices(self) -> Mapping[str, float]: ...

    @property
    def currency(self) -> str: ...


def hourly(device: str, prices: Prices) -> float | None:
    """Returns the hourly price of a device, given the name that its driver reports; None if no price is known.

    The default prices are in US dollars, so with another currency only the operator's own prices count.
    """
    own = cards.best_match(device, prices.gpu_hour_prices)
    if own is not None:
        return prices.gpu_hour_prices[own]
    card = cards.find(device)
    return card.price if card is not None and prices.currency == "USD" else None


def cost(gpu_seconds: float, device: str, prices: Prices) -> float | None:
    """Returns the cost of `gpu_seconds` on a device, in the operator's currency; None if its price is unknown."""
    price = hourly(device, prices)
    return None if price is None else price * gpu_seconds / HOUR
