"""Quotes the cost of serving a tuned model: merged or as an adapter, alone or one of many. Pure functions.

Measurements of the model server come first. Without them the quote is based on a bound: a token of an answer costs one
forward pass, which reads the weights once for all answers of a batch and each answer's keys and values, and multiplies
at the card's published rate. The bound is the longer of reading and multiplying; the share of it that a server reaches
is assumed.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunery.planning import cards
from tunery.planning.cards import Card
from tunery.planning.memory import GIB
from tunery.planning.prices import HOUR, Prices, hourly, round_price, say_digits
from tunery.planning.quote import Range
from tunery.planning.shape import Shape, trainable_params
from tunery.serving import Rate, Rates
from tunery.spec import Full, Technique

BATCH, CONTEXT = 16, 1024
"""Concurrent answers, and tokens of each in memory."""
MANY = 20
LEAST_TOKENS = 200
"""Minimum answer tokens for a measured rate: fewer are mostly warm-up passes."""
Basis = Literal["measured", "memory_bandwidth"]
REACHED = Range(low=0.35, expected=0.6, high=0.85)
"""The share of the bound that a server reaches. Assumed."""
_ADAPTER_SECONDS = 10e-6
"""Seconds of an adapter's two small products at one linear layer. Assumed."""
_USABLE = 0.9
_WIDTH = 2


class Served(BaseModel):
    """One way to serve."""

    model_config = ConfigDict(frozen=True)

    tokens_per_second: Range = Field(description="Throughput of all answers together, on all `gpus`")
    gpus: int = Field(description="The smallest number of GPUs that holds the models")
    price_per_million_tokens: Range | None = Field(
        description="Price of a million answer tokens; null if the card's price is not known"
    )
    basis: Basis = Field(
        "memory_bandwidth", description="Measured by the model server, or derived from the card's rates"
    )
    answers: float | None = Field(None, description="Mean number of concurrent answers in the measurement")


class ServingQuote(BaseModel):
    """What answering should cost."""

    model_config = ConfigDict(frozen=True)

    device: str
    basis: Basis = Field("memory_bandwidth", description="measured: some values were, as their own basis says")
    batch: int = Field(description="Concurrent answers")
    context: int = Field(description="Tokens in memory per answer")
    currency: str
    merged: Served | None = Field(
        description="One model, its adapter merged into its base; null if nothing is known, as for a CPU"
    )
    adapter: Served | None = Field(description="One adapter beside its base; null for a full fine-tune")
    models: int = Field(description="Number of tuned models of one base that share the answers in the next two fields")
    many_merged: Served | None = Field(description="As whole models: every pass reads the model of its answers")
    many_adapters: Served | None = Field(description="As adapters on one copy of the base, which each pass reads once")


def make(
    model_info: Mapping[str, Any], technique: Technique, device: str, prices: Prices, *, batch: int = BATCH
) -> ServingQuote | None:
    """Returns the quote; None for a device that is not in the table, such as a CPU, or a base that does not fit."""
    card = cards.find(device)
    shape = Shape.of(model_info)
    whole = shape.params * _WIDTH
    if card is None or _held(card, whole) < 1:
        return None
    price = hourly(device, prices)
    learns = 0 if isinstance(technique, Full) else trainable_params(model_info, technique) * _WIDTH

    def served(*, models: int, adapters: bool) -> Served:
        gpus = 1 if adapters else -(-models // _held(card, whole))
        seconds = _pass(shape, card, batch=batch, models=models, gpus=gpus, adapter=learns if adapters else None)
        return _served(batch / seconds, gpus, price)

    is_adapted = not isinstance(technique, Full)
    return ServingQuote(
        device=device,
        batch=batch,
        context=CONTEXT,
        currency=prices.currency,
        merged=served(models=1, adapters=False),
        adapter=served(models=1, adapters=True) if is_adapted else None,
        models=MANY,
        many_merged=served(models=MANY, adapters=False),
        many_adapters=served(models=MANY, adapters=True) if is_adapted else None,
    )


def of_rates(
    rates: Rates | None, base: str, model_info: Mapping[str, Any], technique: Technique, prices: Prices
) -> ServingQuote | None:
    """Returns the quote from the model server's measurements of a base; None if there are too few.

    A way of serving without measurements is quoted by the server's card.
    """
    others = ("adapter", "many_adapters") if isinstance(technique, Full) else ()
    own = [
        rate
        for rate in (rates.rates if rates else ())
        if rate.base == base and rate.tokens >= LEAST_TOKENS and rate.way not in others
    ]
    if rates is None or not own:
        return None
    nothing = ServingQuote(
        device=rates.device, batch=BATCH, context=CONTEXT, currency=prices.currency, models=MANY,
        merged=None, adapter=None, many_merged=None, many_adapters=None,
    )  # fmt: skip
    quoted = make(model_info, technique, rates.device, prices) or nothing
    price = hourly(rates.device, prices)
    ways: dict[str, Any] = {rate.way: _measured(rate, price) for rate in own}
    return quoted.model_copy(update=ways | {"basis": "measured"})


def _measured(rate: Rate, price: float | None) -> Served:
    found = rate.tokens / max(1e-9, rate.seconds)
    exact = Range(low=1, expected=1, high=1)
    served = _served(found, 1, price, reached=exact)
    return served.model_copy(update={"basis": "measured", "answers": round(rate.tokens / max(1, rate.passes), 1)})


def _held(card: Card, whole: int) -> int:
    """Returns how many whole models fit on a card beside the keys and values."""
    return int(card.gigabytes * GIB * _USABLE // max(1, whole))


def _pass(shape: Shape, card: Card, *, batch: int, models: int, gpus: int, adapter: int | None) -> float:
    """Returns the seconds in which each of `batch` answers gets one more token. Whole `models` take turns."""
    copies = 1 if adapter is not None else min(models, batch)
    read = copies * shape.params * _WIDTH + batch * CONTEXT * _cache_bytes(shape)
    seconds = max(read / (card.bandwidth * 1e9), 2 * shape.params * batch / (card.tflops * 1e12))
    if adapter is not None:
        read_more = min(models, batch) * adapter / (card.bandwidth * 1e9)
        seconds += read_more + shape.layers * len(shape.modules) * _ADAPTER_SECONDS
    return seconds / gpus


def _cache_bytes(shape: Shape) -> int:
    """Returns the bytes of one token's keys and values."""
    return 2 * shape.layers * shape.kv_width * _WIDTH


def _served(tokens_per_second: float, gpus: int, price: float | None, *, reached: Range = REACHED) -> Served:
    rate = reached.times(tokens_per_second)
    costs = None
    if price is not None:
        dear, usual, cheap = (round_price(price * gpus / HOUR / tokens * 1e6) for tokens in rate.model_dump().values())
        costs = Range(low=cheap, expected=usual, high=dear)
    rounded = Range(**{name: round(value, 1) for name, value in rate.model_dump().items()})
    return Served(tokens_per_second=rounded, gpus=gpus, price_per_million_tokens=costs)


def heading(quote: ServingQuote) -> str:
    """Returns the heading of `in_words`: on which device, as it may be none of this installation."""
    return f"Serving it on {quote.device}"


def in_words(quote: ServingQuote | None) -> list[tuple[str, str]]:
    """Returns each way to serve with its speed and price, on a line each; none without a quote."""
    if quote is None:
        return []
    many = f"{quote.models} models"
    named = [
        ("merged", quote.merged),
        ("adapter", quote.adapter),
        (f"{many}, merged", quote.many_merged),
        (f"{many}, adapters", quote.many_adapters),
    ]
    return [(name, _in_words(way, quote.currency)) for name, way in named if way is not None]


def _in_words(way: Served, currency: str) -> str:
    parts = [f"{_span(way.tokens_per_second, lambda rate: f'{rate:,.0f}')} tokens/s"]
    if way.gpus > 1:
        parts.append(f"on {way.gpus} GPUs")
    if way.price_per_million_tokens is not None:
        parts.append(f"{_span(way.price_per_million_tokens, say_digits)} {currency} per million tokens")
    parts.append("measured" if way.basis == "measured" else "by the card's rates")
    return ", ".join(parts)


def _span(found: Range, say: Callable[[float], str]) -> str:
    low, high = say(found.low), say(found.high)
    return low if low == high else f"{low} to {high}"
