"""Says which known cards fit a run, and what to change for the others. Pure functions."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunery.planning import changes, expected, memory
from tunery.planning.cards import CARDS, Card
from tunery.planning.expected import Expected
from tunery.spec import Plan, Technique

Verdict = Literal["fits", "borderline", "too_small"]


class StepPlan(BaseModel):
    """How the trainer would take a step on a device, and the peak that it then has."""

    model_config = ConfigDict(frozen=True)

    tokens: int = Field(description="Tokens of the largest micro-batch")
    recompute: bool = Field(
        description="Whether the backward pass recomputes the activations of some layers instead of storing them"
    )
    allocated: int = Field(description="Peak of the bytes given out by the allocator")
    bytes: int = Field(description="The same, with the memory of the process itself")

    @classmethod
    def of(cls, found: Expected) -> "StepPlan":
        return cls(
            tokens=found.step.tokens,
            recompute=found.step.recompute > 0,
            allocated=found.allocated,
            bytes=found.estimate.bytes,
        )


class CardFit(BaseModel):
    """A known card, and whether it holds the run. `borderline`: the trainer's probe decides."""

    model_config = ConfigDict(frozen=True)

    name: str
    bytes: int = Field(description="Approximate memory available to a process")
    verdict: Verdict
    plan: StepPlan | None = Field(description="Null if the estimate finds none")
    change: str | None = Field(description="The cheapest change that makes the run fit; null if it fits")


def on_cards(model_info: Mapping[str, Any], technique: Technique, **of_run: Any) -> list[CardFit]:
    """Returns every known card, smallest first. `of_run`: as in `expected.run`, for rows of the maximum length."""
    ordered = sorted(CARDS, key=lambda card: (card.usable, card.price))
    return [_on(card, model_info, technique, of_run) for card in ordered]


def _on(card: Card, model_info: Mapping[str, Any], technique: Technique, of_run: Mapping[str, Any]) -> CardFit:
    capacity = int(card.usable * memory.GIB)
    found = expected.run(model_info, technique, capacity=capacity, **of_run)
    least = {name: value for name, value in of_run.items() if name != "batch"}
    fits = memory.fits(model_info, technique, capacity=capacity, **least)
    asked = {"device": "cuda", "rows": 1, "optimizer": "adamw", "ranks": 1, **least}
    return CardFit(
        name=card.name,
        bytes=capacity,
        verdict="fits" if found else "borderline" if fits else "too_small",
        plan=StepPlan.of(found) if found else None,
        change=None if found else changes.advise(model_info, technique, capacity, gpus=1, **asked),
    )


def of_plan(model_info: Mapping[str, Any], plan: Plan) -> list[CardFit]:
    """Returns the known cards for a job's plan, if all its GPUs were of that kind; sharded if that was left open."""
    resources = plan.resources
    return on_cards(
        model_info,
        plan.technique,
        max_seq_length=plan.max_seq_length,
        rows=plan.method.rows_an_example,
        optimizer=plan.optimizer,
        ranks=1 if resources.sharding == "replicate" else resources.gpus,
        batch=-(-plan.batch_size // resources.gpus),
    )


def in_words(found: Iterable[CardFit]) -> list[tuple[str, str]]:
    """Returns each verdict with its cards, on a line each, and the change for the largest card that is too small."""
    cards = list(found)
    named: list[tuple[Verdict, str]] = [("fits", "fits on"), ("borderline", "may fit on"), ("too_small", "too small")]
    lines = [(text, ", ".join(card.name for card in cards if card.verdict == verdict)) for verdict, text in named]
    small = [card for card in cards if card.change is not None]
    if small:
        lines.append((f"to fit on {small[-1].name}", small[-1].change or ""))
    return [(text, names) for text, names in lines if names]
