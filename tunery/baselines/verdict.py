"""Decides advice by a baseline's measurements, where the rules alone only recommend."""

from collections.abc import Sequence

from tunery.baselines import table
from tunery.baselines.order import Target
from tunery.baselines.table import Row
from tunery.planning import prices
from tunery.planning.advisor import Advice
from tunery.planning.recommendation import Choice, Reason


def judge(advice: Advice, rows: Sequence[Row], target: Target | None) -> Advice:
    """Returns the advice with the measurements before its other reasons.

    If a row meets the target, the advice is the cheapest such row: `prompt`, or `fine_tune` if only a tuned model meets
    it. A row whose interval contains the target does not change the recommendation.
    """
    measured = [row for row in rows if row.score is not None]
    if not measured:
        return advice
    found = table.cheapest(list(rows)) if target is not None else None
    reasons = [_best(measured), *([] if target is None else [of_target(target.at_least, found)])]
    choice: Choice = advice.recommendation
    if found is not None and found.verdict == "met":
        choice = "fine_tune" if found.way == "tuned" else "prompt"
    return advice.model_copy(update={"recommendation": choice, "reasons": [*reasons, *advice.reasons]})


def describe(row: Row) -> str:
    """Describes a row: `the model with 8 nearest examples in the prompt`."""
    model = f"'{row.model}'" + (" elsewhere" if row.place == "external" else "")
    if row.way in ("zero_shot", "tuned"):
        return f"{model} without examples"
    kind = " nearest" if row.way == "nearest" else ""
    return f"{model} with {row.shots}{kind} example{'s' * (row.shots != 1)} in the prompt"


def percent(row: Row) -> str:
    """Formats a score and its interval: `61.0 % (54.1 to 67.5)`."""
    if row.score is None:
        return "-"
    interval = "" if row.low is None or row.high is None else f" ({100 * row.low:.1f} to {100 * row.high:.1f})"
    return f"{100 * row.score:.1f} %{interval}"


def _best(measured: Sequence[Row]) -> Reason:
    best = max(measured, key=lambda row: row.score or 0.0)
    text = f"Measured on {best.rows:,} eval rows, {best.metric}: {describe(best)} gets {percent(best)}"
    zero = next((row for row in measured if row.way == "zero_shot"), best)
    beside = "" if zero is best else f"; {describe(zero)} {percent(zero)}"
    return Reason(rule="measured", text=f"{text}{beside}.")


def of_target(at_least: float, found: Row | None) -> Reason:
    """Returns the reason for the cheapest row that reaches the target, or for none."""
    wanted = f"The target of {100 * at_least:g} %"
    if found is None:
        text = f"{wanted} is not reached by anything measured. A fine-tune, a larger base or better rows may reach it."
        return Reason(rule="target_missed", text=text)
    if found.verdict == "unsure":
        text = f"{wanted} is reached by {describe(found)}, but this may be chance: its interval contains the target. "
        return Reason(rule="target_unsure", text=f"{text}Measure more rows before you rely on it.")
    stop = "No training is needed." if found.way != "tuned" else "It has been reached already."
    return Reason(
        rule="target_met",
        text=f"{wanted} is met by {describe(found)}, the cheapest that does: {percent(found)}. {stop} Stop here.",
    )


COLUMNS = ("what", "score", "95 %", "tokens", "per 1,000", "p50", "device", "target")
_VERDICTS = {"met": "met", "unsure": "maybe", "missed": "no"}


def cells(row: Row) -> dict[str, str]:
    """Returns a row of the table as people read it, by COLUMNS, `model` and `error` besides."""
    way = {"zero_shot": "zero-shot", "few_shot": f"{row.shots} examples", "nearest": f"{row.shots} nearest"}
    interval = "-" if row.low is None or row.high is None else f"{100 * row.low:.1f} to {100 * row.high:.1f}"
    shown = {
        "what": way.get(row.way, "tuned"),
        "score": "-" if row.score is None else f"{100 * row.score:.1f} %",
        "95 %": interval,
        "tokens": "-" if row.prompt_tokens is None else f"{row.prompt_tokens:,.0f}",
        "per 1,000": "-" if row.cost_per_1000 is None else prices.say_digits(row.cost_per_1000),
        "p50": "-" if row.p50_seconds is None else f"{row.p50_seconds:.2f} s",
        "device": row.device or ("elsewhere" if row.place == "external" else "-"),
        "target": _VERDICTS.get(row.verdict or "", "-"),
    }
    return {**shown, "model": row.model, "error": row.error or ""}
