"""Advice that is based on measured baselines: a case for every way in which a target can be met or missed."""

from typing import Any

import pytest

from tunery.baselines import table, verdict
from tunery.baselines.order import Target
from tunery.baselines.table import Row, Verdict
from tunery.planning.advisor import Advice, advise
from tunery.planning.recommendation import Choice, Rows

TARGET = Target(at_least=0.9)
BEFORE = advise(Rows(total=500, usable=500, left_out={}, answer_tokens=5000), "general_accuracy")


def row(verdict: Verdict | None = None, score: float | None = 0.5, **more: Any) -> Row:
    fields: dict[str, Any] = {
        "way": "zero_shot", "model": "m", "shots": 0, "rows": 50, "metric": "exact", "score": score, "low": 0.4,
        "high": 0.6, "metrics": {}, "prompt_tokens": 20.0, "answer_tokens": 3.0, "cost_per_1000": None,
        "p50_seconds": 1.0, "verdict": verdict, **more,
    }  # fmt: skip
    return Row.model_validate(fields)


TUNED = {"way": "tuned", "model": "ft:m", "job": "ftjob-1"}


@pytest.mark.parametrize(
    ("rows", "choice", "rule", "said"),
    [
        ([row("met", 0.95)], "prompt", "target_met", "No training is needed. Stop here."),
        (
            [row("missed"), row("met", 0.95, **TUNED)],
            "fine_tune",
            "target_met",
            "It has been reached already. Stop here.",
        ),
        ([row("met", 0.95, **TUNED), row("met", 0.94)], "prompt", "target_met", "'m' without examples"),
        ([row("unsure", 0.91)], "evaluate_both", "target_unsure", "this may be chance"),
        ([row("missed")], "evaluate_both", "target_missed", "not reached by anything measured"),
        (
            [row("missed"), row(None, None, error="It broke")],
            "evaluate_both",
            "target_missed",
            "not reached by anything",
        ),
    ],
)
def test_a_target_decides(rows: list[Row], choice: Choice, rule: str, said: str) -> None:
    made = verdict.judge(BEFORE, rows, TARGET)
    assert BEFORE.recommendation == "evaluate_both"
    assert (made.recommendation, [reason.rule for reason in made.reasons[:2]]) == (choice, ["measured", rule])
    assert said in made.reasons[1].text
    assert made.reasons[2:] == BEFORE.reasons


def _rules(made: Advice) -> list[str]:
    return [reason.rule for reason in made.reasons]


def test_without_a_target_the_best_row_is_named_and_nothing_decided() -> None:
    made = verdict.judge(BEFORE, [row(score=0.2), row(score=0.8, way="nearest", shots=4)], None)
    assert (made.recommendation, _rules(made)) == ("evaluate_both", ["measured", *_rules(BEFORE)])
    assert made.reasons[0].text == (
        "Measured on 50 eval rows, exact: 'm' with 4 nearest examples in the prompt gets 80.0 % (40.0 to 60.0); "
        "'m' without examples 20.0 % (40.0 to 60.0)."
    )
    assert verdict.judge(BEFORE, [row(score=None)], TARGET) == BEFORE  # nothing was measured


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([row("met", cost_per_1000=2.0), row("met", cost_per_1000=1.0, **TUNED)], 1),
        ([row("unsure", cost_per_1000=0.1), row("met", cost_per_1000=9.0)], 1),
        ([row("unsure", cost_per_1000=0.2), row("unsure", cost_per_1000=0.1)], 1),
        ([row("met"), row("met", cost_per_1000=9.0)], 1),  # an unknown cost may be any
        ([row("met", **TUNED), row("met", prompt_tokens=500.0)], 1),
        ([row("met", prompt_tokens=500.0), row("met", prompt_tokens=20.0)], 1),
        ([row("missed", cost_per_1000=0.0)], None),
    ],
)
def test_the_cheapest_that_meets_it(rows: list[Row], place: int | None) -> None:
    found = table.cheapest(rows)
    assert found is (None if place is None else rows[place])
