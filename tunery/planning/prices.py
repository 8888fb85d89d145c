"""The cost of a device: the operator's hourly prices, and for other cards those of the table."""

from collections.abc import Mapping
from typing import Protocol

from tunery.planning import cards

HOUR = 3600


class Prices(Protocol):
    """The price settings. Keys are cards or parts of a device's name: `H200`, `A100 40GB`, `CPU`."""

    @property
    def gpu_hour_prices(self) -> Mapping[str, float]: ...

    @property
    def currency(self) -> str: ...


def hourly(device: str, prices: Prices) -> float | None:
    """Returns the hourly price of a device by its driver's name; None if none is known.

    The table's prices are in US dollars, so with another currency only the operator's own prices count.
    """
    own = cards.best_match(device, prices.gpu_hour_prices)
    if own is not None:
        return prices.gpu_hour_prices[own]
    card = cards.find(device)
    return card.price if card is not None and prices.currency == "USD" else None


def cost(gpu_seconds: float, device: str, prices: Prices) -> float | None:
    """Returns the cost of the seconds on a device, in the operator's currency; None if its price is unknown."""
    price = hourly(device, prices)
    return None if price is None else price * gpu_seconds / HOUR
