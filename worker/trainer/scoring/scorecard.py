"""The scorecard: answers of base and tuned model to the same questions, compared."""

from typing import Any

from tunery.wire import Score
from worker.trainer.scoring.answers import Question
from worker.trainer.scoring.intervals import paired_interval
from worker.trainer.scoring.metrics import matches


def score(asked: list[Question], base: list[str], tuned: list[str]) -> tuple[Score, list[dict[str, Any]]]:
    """The scorecard and every row's answers."""
    rows = [
        {"messages": q.messages, "wanted": q.wanted, "base": b, "tuned": u,
         "base_right": matches(q.wanted, b, is_call=q.is_call),
         "tuned_right": matches(q.wanted, u, is_call=q.is_call)}
        for q, b, u in zip(asked, base, tuned, strict=True)
    ]  # fmt: skip
    both, only_tuned, only_base = (
        sum(row["tuned_right"] == tuned_right and row["base_right"] == base_right for row in rows)
        for tuned_right, base_right in ((True, True), (True, False), (False, True))
    )
    low, high = paired_interval(both, only_tuned, only_base, len(rows))
    card = Score(
        rows=len(rows),
        base_exact=(both + only_base) / len(rows),
        tuned_exact=(both + only_tuned) / len(rows),
        gain=(only_tuned - only_base) / len(rows),
        gain_low=low,
        gain_high=high,
        samples=_samples(rows),
    )
    return card, rows


def _samples(rows: list[dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """Rows spread evenly over the file: a pick of the best would tell nothing."""
    chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))] if len(rows) > count else rows
    return [
        {"prompt": row["messages"][-1].get("content", ""), "wanted": row["wanted"],
         "base": row["base"], "tuned": row["tuned"]}
        for row in chosen
    ]  # fmt: skip
