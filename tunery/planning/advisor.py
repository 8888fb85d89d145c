"""Advises on a file: whether to fine-tune on it, with which settings, and with which warnings. Pure functions."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tunery.planning import advice, capacity, fitting, recommendation, suggestions
from tunery.planning.fitting import CardFit
from tunery.planning.recommendation import Aim, Choice, Reason, Rows
from tunery.planning.suggestions import Suggestion
from tunery.spec import Plan, Technique

BYTES_A_TOKEN = 4
"""Bytes of UTF-8 per token, roughly, for English and most code."""
_ANY_WIDTH = {"hidden_size": 2000}


class Advice(BaseModel):
    """What to do with a file, and why."""

    model_config = ConfigDict(frozen=True)

    recommendation: Choice
    reasons: list[Reason] = Field(description="The deciding rule, then further reasons")
    rows: Rows
    suggestions: list[Suggestion] = Field(description="For a run on the usable rows")
    warnings: list[str]
    cards: list[CardFit] = Field(
        default_factory=list, description="Known cards, and whether the run fits on each; empty without a base"
    )
    settings: dict[str, JsonValue] = Field(
        description="The suggestions that differ from the defaults, as fields of a request for a job"
    )


def rows_of(said: Mapping[str, Any], tokens_a_byte: float | None = None) -> Rows:
    """Returns the row counts of a report or its summary. `tokens_a_byte`: of answers, by a base's tokenizer."""
    usable = said["usable"]
    return Rows(
        total=said["rows"],
        usable=usable["rows"],
        left_out=usable["left_out"],
        answer_tokens=round(usable["answer_bytes"] * (tokens_a_byte or 1 / BYTES_A_TOKEN)),
        refused=said.get("reason"),
    )


def advise(
    rows: Rows,
    aim: Aim,
    *,
    model_info: Mapping[str, Any] | None = None,
    technique: Technique | None = None,
    bf16_fits: bool | None = None,
    has_held_out: bool = False,
) -> Advice:
    """Returns the advice.

    `model_info`: the base's, None where it is not known. `technique`: the owner's, None: the rules choose.
    `bf16_fits`: whether a device here holds the base in bf16. `has_held_out`: there is a validation or test file.
    """
    known = model_info or {}
    choice, reasons = recommendation.decide(rows, aim)
    chosen = technique or suggestions.suggest_technique(aim, rows, known, bf16_fits)
    plan = suggestions.make_plan(chosen, rows, {**_ANY_WIDTH, **known}, has_held_out=has_held_out)
    found = suggestions.suggest(
        plan,
        aim,
        rows,
        is_own=technique is not None,
        knows_base=bool(known),
        bf16_fits=bf16_fits,
        has_held_out=has_held_out,
    )
    listed = list(found)
    return Advice(
        recommendation=choice,
        reasons=reasons,
        rows=rows,
        suggestions=listed,
        warnings=_warnings(plan, rows, known),
        cards=fitting.of_plan(known, plan) if model_info else [],
        settings=_settings(chosen, listed),
    )


def _warnings(plan: Plan, rows: Rows, model_info: Mapping[str, Any]) -> list[str]:
    found = advice.warnings(plan, examples=rows.usable, model_info={**_ANY_WIDTH, **model_info})
    return found + (capacity.warnings(model_info, plan.technique, rows.answer_tokens) if model_info else [])


def _settings(technique: Technique, listed: list[Suggestion]) -> dict[str, JsonValue]:
    """Returns the suggested settings of a job.

    Rates, epochs and batch sizes stay "auto", which is decided by the same rules from the rows that are sent.
    """
    shown: dict[str, JsonValue] = {"technique": {"type": technique.type, **technique.model_dump(exclude_defaults=True)}}
    fraction = next(one.value for one in listed if one.field == "replay.share")
    return shown if fraction is None else {**shown, "replay": {"share": fraction}}
