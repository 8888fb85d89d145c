"""Compares the textbook's table of hours and prices with quotes of the same runs: `python -m bench.textbook`.

Rows are assumed to have 2,048 tokens and to be seen three times, eight a step. Nothing is measured: quotes come from
the table of cards. The MFU that the textbook's hours imply counts four operations per token and weight of a frozen base
and six of a full fine-tune, over the published rate of all its cards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunery.planning import cards, quote, speed, workload
from tunery.planning.prices import HOUR
from tunery.planning.quote import Quote, Range
from tunery.planning.workload import Counts, Workload
from tunery.settings import Settings
from tunery.spec import Full, Lora, Plan, Qlora, Technique

ROW_TOKENS, EPOCHS, BATCH = 2048, 3, 8
_LLAMA_2 = {"vocab_size": 32000, "tie_word_embeddings": False}
BASES: dict[str, dict[str, Any]] = {
    "7B": {
        **_LLAMA_2, "params": 6_738_415_616, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "13B": {
        **_LLAMA_2, "params": 13_015_864_320, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
    "70B": {
        **_LLAMA_2, "params": 68_976_648_192, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip
"""Llama 2's shapes."""


@dataclass(frozen=True)
class Said:
    """A line of the textbook: a run, with the hours and dollars that it states."""

    base: str
    technique: Technique
    rows: int
    card: str
    gpus: int
    hours: float
    dollars: float


TEXTBOOK = (
    Said("7B", Qlora(), 1_000, "A10G", 1, 2, 3),
    Said("7B", Lora(), 10_000, "A100", 1, 4, 12),
    Said("13B", Full(), 50_000, "A100", 4, 24, 300),
    Said("70B", Full(), 50_000, "A100", 8, 5 * 24, 3_000),
)


def work_of(said: Said) -> Workload:
    """Returns the run as Tunery's `Workload`."""
    sharding = "full_shard" if said.gpus > 1 else "replicate"
    plan = Plan(
        technique=said.technique,
        n_epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=1e-4,
        learning_rate_multiplier=1.0,
        seed=0,
        resources={"gpus": said.gpus, "sharding": sharding},  # type: ignore[arg-type]  # pydantic makes it Resources
    )
    counts = Counts(said.rows, said.rows * ROW_TOKENS, "rows")
    return workload.of_job(plan, BASES[said.base], counts, "cuda")


def quoted(said: Said) -> Quote:
    """Returns Tunery's quote of the run, at the table's prices."""
    found = quote.make(work_of(said), said.card, [], Settings())
    assert found is not None, "the card is in the table"
    return found


def implied_mfu(said: Said) -> float:
    """Returns the fraction of the cards' published rate that the textbook's hours imply."""
    work, card = work_of(said), cards.find(said.card)
    assert card is not None, "the card is in the table"
    operations = speed.operations(work.shape, work.technique) * work.tokens
    return operations / (said.hours * HOUR * said.gpus * card.tflops * 1e12)


def table() -> Iterator[str]:
    """Yields the lines of a table in Markdown."""
    yield "| run | cards | textbook | it implies an MFU of | quote: hours | quote: dollars |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for said in TEXTBOOK:
        found = quoted(said)
        assert found.cost is not None, "the card has a price"
        hours = f"{said.hours:g} h, ${said.dollars:,.0f}"
        yield (
            f"| {said.technique.type} {said.base}, {said.rows:,} rows | {said.gpus} x {said.card} | {hours} "
            f"| {implied_mfu(said):.0%} | {_range(found.seconds.times(1 / HOUR))} | {_range(found.cost)} |"
        )


def _range(found: Range) -> str:
    low, expected, high = (f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in found.model_dump().values())
    return f"{expected} ({low} to {high})"


if __name__ == "__main__":
    print("\n".join(table()))
