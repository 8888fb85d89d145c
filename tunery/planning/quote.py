"""Quotes the time and cost of a run, as a range, before it is submitted. Pure functions."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tunery.planning import cards, speed
from tunery.planning.prices import HOUR, Prices, cost, round_price
from tunery.planning.prices import say as say_price
from tunery.planning.speed import Basis, Record, Speed
from tunery.planning.workload import Source, Workload

Part = Literal["start", "training", "evaluation", "saving", "export"]

SPREADS: dict[Basis, tuple[float, float]] = {
    "same": (0.85, 1.2),
    "other_method": (0.75, 1.4),
    "other_technique": (0.7, 1.5),
    "other_base": (0.6, 1.8),
    "estimated": (0.6, 2.0),
}
"""How far a run may be from the expectation, by the basis of the quote."""
_OF_TOKENS: dict[Source, tuple[float, float]] = {"rows": (1.0, 1.0), "report": (0.95, 1.1), "bytes": (0.6, 1.4)}
_EARLY_ANSWERS = 0.35
"""The least share of the token limit that answers may have: a tuned model stops by itself."""
_PARALLEL = {False: 0.92, True: 0.75}
"""Share of the ideal speed-up of several GPUs, with a copy on each (False) or sharded (True). The first lies between
what `bench.scaling` measured on two, 0.98 for adapters and 0.90 for full weights; the second is assumed."""


class Range(BaseModel):
    """A figure with its lower and upper bound."""

    model_config = ConfigDict(frozen=True)

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> "Range":
        """Returns the range in another unit."""
        return Range(low=self.low * factor, expected=self.expected * factor, high=self.high * factor)


class Quote(BaseModel):
    """What a run is expected to take on one kind of device, from its claim to its end."""

    model_config = ConfigDict(frozen=True)

    device: str = Field(description="The device by its driver's name, or a card of the table")
    gpus: int = Field(description="Number of devices; 0: the host's CPU")
    seconds: Range
    gpu_hours: Range
    cost: Range | None = Field(description="Null if the device's price is not known")
    currency: str
    parts: dict[Part, float] = Field(description="The expected seconds of each part")
    tokens: int = Field(description="Tokens of all steps")
    tokens_from: Source = Field(
        description="Counted row by row, taken from the file's report, or estimated from its bytes"
    )
    speed_from: Basis = Field(
        description="A run here of this base, technique and method, of this base and technique, of this base, of "
        "another base, or the table of cards"
    )
    measured: list[str] = Field(description="The jobs whose speed was measured; empty if it is estimated")
    basis: str = Field(description="The basis in words")
    at_creation: Range | None = Field(None, description="The seconds that were quoted before the job's files were read")


def make(work: Workload, device: str, records: Sequence[Record], prices: Prices) -> Quote | None:
    """Returns the quote of a run on a device. `records`: past runs on devices of this name, newest first.

    None for a GPU that is not in the table and has no records.
    """
    chosen = speed.choose(list(records), work)
    if chosen:
        speeds = [speed.scaled(speed.of_record(record), record.work, work, device) for record in chosen]
        return _put_together(work, device, speeds, [seconds_of(work, each) for each in speeds], prices)
    slow, fast = _estimated(device, work, recompute=True), _estimated(device, work, recompute=False)
    if slow is None or fast is None:
        return None
    return _put_together(work, device, [fast], [seconds_of(work, each) for each in (fast, slow)], prices)


def _estimated(device: str, work: Workload, *, recompute: bool) -> Speed | None:
    if device == "CPU":
        return speed.of_cpu(work)
    card = cards.find(device)
    return None if card is None else speed.of_card(card, work, recompute=recompute)


def seconds_of(work: Workload, pace: Speed) -> dict[Part, float]:
    """Returns the seconds of each part of a run at this speed."""
    devices = 1 if work.gpus == 1 else work.gpus * _PARALLEL[work.sharded]
    passes = 2 - pace.knows_base
    evaluation = (
        pace.valid_token * work.valid_tokens
        + pace.answer_token * work.answers * work.answer_tokens
        + pace.pair_token * work.pair_tokens
        + pace.general_token * (passes * work.item_tokens + 2 * work.prompt_tokens)
    )
    before = (
        pace.replay_token * work.replay_answers * work.replay_answer_tokens
        + pace.reference_token * work.reference_tokens
    )
    return {
        "start": pace.start + pace.row_token * work.row_tokens + before / devices,
        "training": pace.step * work.steps + (pace.token * work.tokens) / devices,
        "evaluation": evaluation / devices + pace.scores * work.scored,
        "saving": pace.save + pace.checkpoint * work.checkpoints,
        "export": pace.export * work.exports,
    }


def _put_together(
    work: Workload, device: str, speeds: Sequence[Speed], times: Sequence[dict[Part, float]], prices: Prices
) -> Quote:
    """Returns the median of the runs' estimates, and a range that includes all of them."""
    basis = speeds[0].basis
    parts: dict[Part, float] = {part: round(median(each[part] for each in times), 3) for part in times[0]}
    lows, highs = _OF_TOKENS[work.source]
    low = min(_bounded(each, lows, _EARLY_ANSWERS if basis == "estimated" else 1.0) for each in times)
    high = max(_bounded(each, highs, 1.0) for each in times)
    down, up = SPREADS[basis]
    seconds = Range(low=low * down, expected=sum(parts.values()), high=high * up)
    gpus = 0 if device == "CPU" else work.gpus
    price = cost(HOUR, device, prices)
    return Quote(
        device=device,
        gpus=gpus,
        seconds=_rounded(seconds, 1),
        gpu_hours=_rounded(seconds.times(gpus / HOUR), 4),
        cost=None if price is None else _priced(seconds.times(price * max(1, gpus) / HOUR)),
        currency=prices.currency,
        parts=parts,
        tokens=round(work.tokens),
        tokens_from=work.source,
        speed_from=basis,
        measured=[each.job for each in speeds if each.job],
        basis=explain(work, device, speeds),
    )


def _bounded(times: dict[Part, float], tokens: float, answers: float) -> float:
    """Returns a run's seconds with `tokens` times the tokens, and answers `answers` times as long."""
    return sum(times.values()) + (tokens - 1) * times["training"] + (answers - 1) * times["evaluation"]


def _priced(found: Range) -> Range:
    return Range(**{name: round_price(value) for name, value in found.model_dump().items()})


def _rounded(found: Range, digits: int) -> Range:
    return Range(**{name: round(value, digits) for name, value in found.model_dump().items()})


_TOKENS: dict[Source, str] = {
    "rows": "Tokens were counted row by row",
    "report": "Tokens are those of the file's report",
    "bytes": "Tokens are estimated from the file's bytes",
}


def explain(work: Workload, device: str, speeds: Sequence[Speed]) -> str:
    """Returns what the quote is based on, in words."""
    first = speeds[0]
    runs = "the last run" if len(speeds) == 1 else f"the last {len(speeds)} runs"
    said = {
        "same": f"the speed is that of {runs} here of this base, technique and method on {device}",
        "other_method": f"the speed is that of {runs} here of this base and technique on {device}, with another method",
        "other_technique": f"the speed is that of {runs} here of this base with another technique on {device}, scaled",
        "other_base": f"the speed is that of {runs} here of {first.model} on {device}, the nearest in size, scaled",
        "estimated": f"nothing similar has run here yet, so the speed on {device} is estimated",
    }[first.basis]
    return f"{_TOKENS[work.source]}; {said}."


def left(quote: Quote, fraction: float) -> Quote:
    """Returns the quote of the rest of a run with a `fraction` of its steps done; other parts count in full."""
    parts = quote.parts | {"training": quote.parts["training"] * (1 - fraction)}
    factor = sum(parts.values()) / max(1e-9, sum(quote.parts.values()))
    changed = {"seconds": quote.seconds.times(factor), "gpu_hours": quote.gpu_hours.times(factor), "parts": parts}
    return quote.model_copy(update=changed | {"cost": quote.cost and quote.cost.times(factor)})


class Actual(BaseModel):
    """What a run took, beside its quote."""

    model_config = ConfigDict(frozen=True)

    device: str
    gpus: int
    seconds: float = Field(description="Over all attempts, each from its claim to its end")
    gpu_hours: float
    cost: float | None
    currency: str
    of_quoted: float | None = Field(description="Ratio of the seconds to the expected ones; 1: as quoted")
    in_range: bool | None = Field(description="Whether the seconds are in the quoted range")


def compare(quote: Quote | None, device: str, gpus: int, seconds: float, prices: Prices) -> Actual:
    """Returns what a run took on `gpus` devices (0: CPU), and the difference from its quote."""
    return Actual(
        device=device,
        gpus=gpus,
        seconds=round(seconds, 1),
        gpu_hours=round(seconds * gpus / HOUR, 4),
        cost=None if (paid := cost(seconds * max(1, gpus), device, prices)) is None else round_price(paid),
        currency=prices.currency,
        of_quoted=round(seconds / quote.seconds.expected, 3) if quote is not None and quote.seconds.expected else None,
        in_range=None if quote is None else quote.seconds.low <= seconds <= quote.seconds.high,
    )


def say(quote: Quote | None, actual: Actual) -> str:
    """Returns the comparison in a sentence, for the job's event."""
    spent = [f"{actual.gpu_hours:.2f} GPU hours"] if actual.gpus else []
    spent += [] if actual.cost is None else [f"{say_price(actual.cost)} {actual.currency}"]
    took = f"The run took {actual.seconds:.0f} s" + (f" ({', '.join(spent)})" if spent else "")
    if quote is None or actual.of_quoted is None:
        return took
    asked = quote.seconds
    apart = (
        "as expected"
        if actual.of_quoted == 1
        else f"{abs(actual.of_quoted - 1):.0%} " + ("longer" if actual.of_quoted > 1 else "shorter")
    )
    return f"{took}; quoted were {asked.expected:.0f} s ({asked.low:.0f} to {asked.high:.0f}): {apart}"
