"""The scorecard: compares answers of base and tuned model to the same questions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunery.trainer_protocol import LabelShares, Measure, Sample, Score
from worker.trainer.scoring import metrics
from worker.trainer.scoring.answers import Question
from worker.trainer.scoring.intervals import bootstrap_interval, mcnemar, paired_interval
from worker.trainer.scoring.matching import matches
from worker.trainer.scoring.metrics import Metric

_MOST_LABELS = 100
Rates = Sequence[tuple[float, float]]


def score(asked: list[Question], base: list[str], tuned: list[str]) -> tuple[Score, list[dict[str, Any]]]:
    """Returns the scorecard and every row's answers."""
    rows = [
        {"messages": q.messages, "wanted": q.wanted, "base": b, "tuned": u,
         "base_right": matches(q.wanted, b, is_call=q.is_call),
         "tuned_right": matches(q.wanted, u, is_call=q.is_call)}
        for q, b, u in zip(asked, base, tuned, strict=True)
    ]  # fmt: skip
    task, chosen = metrics.choose(asked)
    measures = {metric.name: compare(metric, asked, base, tuned) for metric in chosen}
    labels = _by_label(asked, base, tuned) if task == "labels" else {}
    return assemble(rows, task, measures, primary=chosen[0].name, exact=measures["exact"], labels=labels), rows


def assemble(
    rows: list[dict[str, Any]],
    task: str,
    measures: dict[str, Measure],
    *,
    primary: str,
    exact: Measure,
    labels: dict[str, LabelShares] | None = None,
) -> Score:
    """Returns the scorecard of measured rows. `exact`: what it shows as the share of right answers."""
    return Score(
        rows=len(rows),
        base_exact=exact.base,
        tuned_exact=exact.tuned,
        gain=exact.gain,
        gain_low=exact.low,
        gain_high=exact.high,
        samples=pick_samples(rows),
        task=task,
        primary=primary,
        metrics=measures,
        labels=labels or {},
    )


def compare(metric: Metric, asked: list[Question], base: list[str], tuned: list[str]) -> Measure:
    """Returns a metric for both models, and the 95 % interval of its gain on the same rows."""
    return compare_rates(metric.rates(asked, base), metric.rates(asked, tuned), is_binary=metric.is_binary)


def compare_rates(before: Rates, after: Rates, *, is_binary: bool) -> Measure:
    """Returns both models' figures on the same rows, from both numbers of each row; see `Metric`."""
    first, second = metrics.figure(before), metrics.figure(after)
    p = None
    if is_binary:
        pairs = Counter((b[0] > 0, u[0] > 0) for b, u in zip(before, after, strict=True))
        both, only_tuned, only_base = pairs[True, True], pairs[False, True], pairs[True, False]
        low, high = paired_interval(both, only_tuned, only_base, len(before))
        p = mcnemar(only_tuned, only_base)
    else:
        low, high = bootstrap_interval(after, before)
    return Measure(base=first, tuned=second, gain=second - first, low=low, high=high, p=p)


def _by_label(asked: list[Question], base: list[str], tuned: list[str]) -> dict[str, LabelShares]:
    """Returns the share of right answers of each wanted label, the most frequent labels first."""
    totals: Counter[str] = Counter()
    correct: Counter[tuple[str, str]] = Counter()
    for question, before, after in zip(asked, base, tuned, strict=True):
        wanted = metrics.label(question.wanted)
        totals[wanted] += 1
        correct["base", wanted] += metrics.label(before) == wanted
        correct["tuned", wanted] += metrics.label(after) == wanted
    return {
        label: LabelShares(rows=n, base=correct["base", label] / n, tuned=correct["tuned", label] / n)
        for label, n in totals.most_common(_MOST_LABELS)
    }


def pick_samples(rows: list[dict[str, Any]], count: int = 5) -> list[Sample]:
    """Returns rows spread evenly over the file: the best ones would not be representative."""
    chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))] if len(rows) > count else rows
    return [
        Sample(
            prompt=row["messages"][-1].get("content") or "", wanted=row["wanted"], base=row["base"], tuned=row["tuned"]
        )
        for row in chosen
    ]
