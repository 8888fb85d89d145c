"""Suggests settings for a run on the usable rows, each by a fixed rule with its reason. Pure functions."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tunery.planning import advice, capacity
from tunery.planning.recommendation import MANY, Aim, Rows
from tunery.spec import Full, Lora, Plan, Qlora, Replay, Technique, TrainingSpec

LOW_RANK, HIGH_RANK = 4, 64
RANKS_BY_ROWS = ((MANY, 16), (10 * MANY, 32), (math.inf, HIGH_RANK))
"""For the aim of a domain's language: the rank for up to that many usable rows."""
_LOW_RANK_AIMS: tuple[Aim, ...] = ("output_format", "style")
_REPLAY_AIMS: tuple[Aim, ...] = ("domain_language", "general_accuracy")
_LEAST_HELD_OUT, _MOST_HELD_OUT = 50, 1000


class Suggestion(BaseModel):
    """A setting's value, and the rule that chose it. `field`: as a request for a job has it; `held_out.share`: as a
    cleaning has it. `value` is null where it is left open."""

    model_config = ConfigDict(frozen=True)

    field: str
    value: JsonValue
    rule: str = Field(description="The rule's name, which never changes")
    text: str = Field(description="Why")


def held_out_rows(usable: int) -> int:
    """Returns how many rows to hold out: a tenth, between 50 and 1,000; of fewer than 150 rows a third."""
    return min(max(usable // 10, _LEAST_HELD_OUT), _MOST_HELD_OUT, usable // 3)


def suggest_technique(aim: Aim, rows: Rows, model_info: Mapping[str, Any], bf16_fits: bool | None) -> Technique:
    """Returns LoRA or QLoRA with a rank for the aim. `bf16_fits`: None if no device is known."""
    kind = advice.default_technique(bf16_fits is not False, model_info)
    rank = _rank(aim, rows.usable)[0]
    if model_info.get("hidden_size"):
        rank = capacity.fit_rank(model_info, Lora(r=rank), rows.answer_tokens, least=LOW_RANK, most=HIGH_RANK)
    return kind.model_copy(update={"r": rank})


def _rank(aim: Aim, usable: int) -> tuple[int, str, str]:
    """Returns the rank, its rule and why."""
    if aim in _LOW_RANK_AIMS:
        return LOW_RANK, "rank_of_form", "Format and style are a small change: a rank of 4 holds them."
    if aim == "domain_language":
        rank = next(rank for most, rank in RANKS_BY_ROWS if usable <= most)
        why = "A domain's language is a large change: 16 up to 1,000 rows, 32 up to 10,000, 64 above."
        return rank, "rank_of_domain", f"{why} The file has {usable:,}."
    return Lora().r, "rank_by_default", "The default: the learning rate matters more than the rank."


def make_plan(technique: Technique, rows: Rows, model_info: Mapping[str, Any], *, has_held_out: bool) -> Plan:
    """Returns the plan of a job with this technique on the usable rows that remain for training."""
    examples = max(1, rows.usable if has_held_out else rows.usable - held_out_rows(rows.usable))
    spec = TrainingSpec(technique=technique, seed=0)
    return advice.resolve(spec, examples=examples, model_info=model_info, bf16_fits=True)


def suggest(
    plan: Plan, aim: Aim, rows: Rows, *, is_own: bool, knows_base: bool, bf16_fits: bool | None, has_held_out: bool
) -> Iterator[Suggestion]:
    """Returns every setting with its reason. `is_own`: the owner chose the technique; `knows_base`: the base's width is
    known; `bf16_fits`: None if no device is known; `has_held_out`: the owner has a held-out file already."""
    yield _technique(plan.technique, is_own=is_own, bf16_fits=bf16_fits)
    if isinstance(plan.technique, Lora):
        yield from _adapter(plan.technique, aim, rows, is_own=is_own)
    yield _rate(plan, knows_base=knows_base)
    yield from _passes(plan)
    yield _replay(plan.technique, aim)
    if not has_held_out:
        yield _held_out(rows)


def _technique(technique: Technique, *, is_own: bool, bf16_fits: bool | None) -> Suggestion:
    said = {"field": "technique.type", "value": technique.type}
    if is_own:
        return Suggestion(**said, rule="technique_as_asked", text="As requested.")
    if isinstance(technique, Qlora):
        text = "The base does not fit in bf16 on any GPU here, so it is kept in four bits."
        if bf16_fits is not False:
            text = "This base cannot be trained with LoRA."
        return Suggestion(**said, rule="qlora_where_it_must_be", text=text)
    known = "The base fits in bf16 here." if bf16_fits else "If the base does not fit in bf16, use qlora."
    text = (
        f"{known} LoRA forgets less than a full fine-tune; a merged adapter adds no cost at run time, and separate "
        "adapters can share one base, one for each tenant."
    )
    return Suggestion(**said, rule="lora_first", text=text)


def _adapter(technique: Lora, aim: Aim, rows: Rows, *, is_own: bool) -> Iterator[Suggestion]:
    rank, rule, why = _rank(aim, rows.usable)
    if is_own and technique.r != rank:
        rule, why = "rank_as_asked", f"As requested; the rule for this aim suggests {rank}."
    elif technique.r != rank:
        few = technique.r < rank
        why = f"The rule for this aim suggests {rank}, " + (
            "which could memorise so few tokens." if few else "which is too small for so many tokens."
        )
        rule = "rank_by_capacity"
    yield Suggestion(field="technique.r", value=technique.r, rule=rule, text=why)
    low, high = (technique.r * times for times in advice.ALPHA_BAND)
    text = (
        f"The usual 2 to 4 times the rank would be {low} to {high}. The default is 32 at every rank: with a fixed "
        "alpha the best learning rate hardly depends on the rank, and the default rate is tuned for it."
    )
    yield Suggestion(field="technique.alpha", value=technique.alpha, rule="alpha_stays", text=text)


def _rate(plan: Plan, *, knows_base: bool) -> Suggestion:
    said = {"field": "learning_rate", "rule": "rate_by_width"}
    if not knows_base:
        return Suggestion(**said, value=None, text="Chosen by the job: the rate depends on the base's width.")
    factor = ", a tenth of LoRA's" if isinstance(plan.technique, Full) else ""
    text = f"The default: 5e-4 x (2000 / hidden size)^0.78{factor}. Larger bases need a lower rate."
    return Suggestion(**said, value=float(f"{plan.learning_rate:.3g}"), text=text)


def _passes(plan: Plan) -> Iterator[Suggestion]:
    text = "Three; more if that is under 100 examples in total (at most 25 epochs), fewer if it is over 25,000."
    yield Suggestion(field="n_epochs", value=plan.n_epochs, rule="epochs_by_rows", text=text)
    text = "Adapters learn worse from large batches."
    yield Suggestion(field="batch_size", value=plan.batch_size, rule="batch_by_default", text=text)


def _replay(technique: Technique, aim: Aim) -> Suggestion:
    said = {"field": "replay.share"}
    if isinstance(technique, Full):
        text = "A full fine-tune forgets most: a tenth of general rows preserves the model's general abilities."
        return Suggestion(**said, value=Replay().share, rule="replay_for_full", text=text)
    if aim in _REPLAY_AIMS:
        text = "This aim changes the model a lot: a tenth of general rows preserves its general abilities."
        return Suggestion(**said, value=Replay().share, rule="replay_for_aim", text=text)
    text = "None: a small change forgets little. Add it if the scorecard's general accuracy falls."
    return Suggestion(**said, value=None, rule="replay_left_out", text=text)


def _held_out(rows: Rows) -> Suggestion:
    held_out = held_out_rows(rows.usable)
    fraction = round(held_out / rows.usable, 3) if rows.usable else None
    reach = (
        (f" An accuracy measured on them is precise to about {98 / math.sqrt(held_out):.0f} points.")
        if held_out
        else ""
    )
    text = f"{held_out:,} rows that are not trained on: a tenth, at least 50, at most 1,000, never over a third.{reach}"
    return Suggestion(field="held_out.share", value=fraction, rule="held_out_by_rows", text=text)
