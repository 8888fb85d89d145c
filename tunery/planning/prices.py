"""What a device costs: the operator's prices of an hour, and for other cards those of the table."""

from collections.abc import Mapping
from typing import Protocol

from tunery.planning import cards

HOUR = 3600


class Prices(Protocol):
    """What the settings say of prices. Keys are cards or parts of a device's name: `H200`, `A100 40GB`, `CPU`."""

    @property
    def gpu_hour_prices(self) -> Mapping[str, float]: ...

    @property
    def currency(self) -> str: ...


def hourly(device: str, prices: Prices) -> float | None:
    """Returns the price of an hour of one device, by the driver's name of it; None where nobody has set one.

    The table's prices are US dollars, so with another currency the operator's own are the only ones.
    """
    own = cards.best_match(device, prices.gpu_hour_prices)
    if own is not None:
        return prices.gpu_hour_prices[own]
    card = cards.find(device)
    return card.price if card is not None and prices.currency == "USD" else None


def cost(gpu_seconds: float, device: str, prices: Prices) -> float | None:
    """Returns what so many seconds of a device cost, in the operator's currency; None where its price is not known."""
    price = hourly(device, prices)
    return None if price is None else price * gpu_seconds / HOUR
