"""The cost of a device, by the operator's hourly prices or, where none is set, the default ones of `cards.CARDS`."""

from collections.abc import Mapping
from decimal import Decimal
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


def round_price(value: float) -> float:
    """Returns a price to four decimals, a small one to three digits: it is not free."""
    return round(value, 4) if value >= 0.1 else float(f"{value:.3g}")


def say(value: float) -> str:
    """Formats a price with two decimals, or with two digits where those would show less: 3.60, 0.09, 0.000047."""
    return f"{value:.2f}" if value == 0 or value >= 0.095 else say_digits(value, 2)


def say_digits(value: float, digits: int = 3) -> str:
    """Formats a number with so many digits and no exponent: 1230, 0.0000123."""
    return f"{Decimal(f'{value:.{digits}g}'):f}"
