"""A gate compares its limits with the confidence intervals of a model's measurements."""

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import Ear, chat, lay_out, plan, said

from tunery.spec import Evaluation, Full, Gate, General
from tunery.trainer_protocol import Forgetting, GeneralScore, Measure, Score
from worker.trainer import gate
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

SCORE = Score(rows=100, base_exact=0.2, tuned_exact=0.3, gain=0.1, gain_low=0.04, gain_high=0.16)
MOVED = Forgetting(
    prompts=20, tokens=900, kl=0.5, kl_low=0.4, kl_high=0.6,
    base_nll=1, tuned_nll=1.2, nll_change=0.2, nll_change_low=0.1, nll_change_high=0.3,
)  # fmt: skip
GENERAL = GeneralScore(
    benchmark="default", items=800, base_accuracy=0.5, tuned_accuracy=0.47, change=-0.03, change_low=-0.05,
    change_high=-0.01, p=0.01, base_accuracy_norm=0.5, tuned_accuracy_norm=0.5, forgetting=MOVED,
)  # fmt: skip
WHOLE = SCORE.model_copy(update={"general": GENERAL})


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        ({"min_task_gain": 0.04}, "passed"),
        ({"min_task_gain": 0.05}, "inconclusive"),
        ({"min_task_gain": 0.16}, "inconclusive"),
        ({"min_task_gain": 0.17}, "failed"),
        ({"max_general_drop": 0.05}, "passed"),
        ({"max_general_drop": 0.04}, "inconclusive"),
        ({"max_general_drop": 0.01}, "inconclusive"),
        ({"max_general_drop": 0.005}, "failed"),
        ({"max_kl": 0.6}, "passed"),
        ({"max_kl": 0.45}, "inconclusive"),
        ({"max_kl": 0.39}, "failed"),
        ({"min_task_gain": 0.04, "max_kl": 0.45}, "inconclusive"),
        ({"min_task_gain": 0.05, "max_kl": 0.39}, "failed"),
        ({"min_task_gain": 0.04, "max_general_drop": 0.05, "max_kl": 0.6}, "passed"),
    ],
)
def test_a_limit_passes_or_fails_only_outside_the_interval(limit: dict[str, float], status: str) -> None:
    verdict = gate.judge(Gate(**limit), WHOLE)
    assert verdict.status == status
    assert verdict.withheld == (status == "failed")
    assert [check.name for check in verdict.checks] == list(limit)
    strict = gate.judge(Gate(**limit, on_inconclusive="withhold"), WHOLE)
    assert strict.withheld == (status != "passed")


def test_the_interval_decides() -> None:
    """The KL is 0.5, with an interval from 0.4 to 0.6, so a limit of 0.55 is inconclusive."""
    assert gate.judge(Gate(max_kl=0.55), WHOLE).status == "inconclusive"


def test_what_was_not_measured_is_inconclusive() -> None:
    demands = Gate(min_task_gain=0.0, max_general_drop=1.0, max_kl=9.0)
    for score in (None, SCORE, WHOLE.model_copy(update={"general": GENERAL.model_copy(update={"forgetting": None})})):
        assert gate.judge(demands, score).status == "inconclusive"


def test_the_task_is_judged_by_its_primary_metric() -> None:
    other = Measure(base=0.1, tuned=0.6, gain=0.5, low=0.4, high=0.6)
    score = SCORE.model_copy(update={"primary": "field_f1", "metrics": {"field_f1": other}})
    [check] = gate.judge(Gate(min_task_gain=0.3), score).checks
    assert (check.value, check.low, check.high, check.status) == (0.5, 0.4, 0.6, "passed")


def test_a_gate_demands_something() -> None:
    with pytest.raises(ValueError, match="send min_task_gain, max_general_drop or max_kl"):
        Gate()


ROWS = [chat(i) for i in range(8)]


def judged(folder: Path, base: Path, ear: Ear, **changes: Any) -> Any:
    evaluation = Evaluation(test_file="file-test", max_new_tokens=2, general=General(items=10, prompts=8))
    made = {"technique": Full(), "learning_rate": 1e-2, "n_epochs": 3, "evaluation": evaluation} | changes
    lay_out(folder, base, plan(**made), ROWS, test=ROWS[:2])
    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())
    verdict = said(ear, "gated")[-1]
    assert json.loads((folder / "out" / "gate.json").read_text()) == verdict.model_dump(mode="json", exclude={"type"})
    readme = (folder / "out" / "README.md").read_text()
    assert f"**{verdict.status}**: the model is {'withheld' if verdict.withheld else 'published'}" in readme
    assert "| general ability, " in readme
    rate = f"learning rate {made['learning_rate']:.2e}"
    assert f"Settings: technique full, method supervised, epochs 3, batch size 4, {rate}, seed " in readme
    return verdict


def test_a_run_that_forgets_is_caught(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    """Too high a learning rate moves the model far from its base and fails the gate; one near zero passes."""
    demands = Gate(max_kl=0.01)
    spoilt = judged(tmp_path / "spoilt", tiny, ear, gate=demands)
    assert (spoilt.status, spoilt.withheld) == ("failed", True)

    still = judged(tmp_path / "still", tiny, ear, gate=demands, learning_rate=1e-9)
    assert (still.status, still.withheld) == ("passed", False)
