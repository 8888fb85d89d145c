"""A run resumes from snapshots of earlier releases, but not from those of other plans or rows."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from run_folders import Ear, Interrupting, chat, lay_out, plan, said, steps_of
from safetensors.torch import load_file

import worker.trainer.run as run_module
from tunery.spec import Evaluation, Lora, Plan, Run
from worker.trainer import checkpoints, fingerprint
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(10)]


def test_snapshot_of_another_host_is_taken_from_resume_and_a_damaged_one_is_not(tmp_path: Path, tiny: Path) -> None:
    settled = plan(n_epochs=2)
    first = lay_out(tmp_path / "first", tiny, settled, ROWS)
    stop_signal = StopSignal()
    assert not carry_out(first, Interrupting(3, stop_signal), stop_signal)  # the stop is noticed in the next step
    second = lay_out(tmp_path / "second", tiny, settled, ROWS)
    (first / "snapshots" / "step-4").rename(second / "resume")

    t = prepare(second, MessageWriter(None), StopSignal())
    found = checkpoints.find_snapshot(t)
    assert found == second / "resume"
    assert checkpoints.restore(t, found).step == 4

    damaged = bytearray((found / "weights.safetensors").read_bytes())
    damaged[-1] ^= 1
    (found / "weights.safetensors").write_bytes(damaged)
    assert checkpoints.find_snapshot(t) is None
    (found / "state.json").write_text("{")
    assert checkpoints.find_snapshot(t) is None


def test_snapshot_is_found_the_next_day_though_the_template_writes_the_date(tmp_path: Path) -> None:
    dated = tiny_models.llama(tmp_path / "base", template="{{ strftime_now('%d %b %Y') }}\n" + tiny_models.CHATML)
    folder = lay_out(tmp_path / "run", dated, plan(), ROWS, now=datetime(2026, 3, 1, 23, 59, tzinfo=UTC))
    stop_signal = StopSignal()
    assert not carry_out(folder, Interrupting(1, stop_signal), stop_signal)

    t = prepare(folder, MessageWriter(None), StopSignal())

    assert t.template.tokenizer.decode(t.rows.rows[0].input_ids).startswith("01 Mar 2026")
    assert checkpoints.find_snapshot(t) is not None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("later", [False, True], ids=["this release", "a release with one more option"])
def test_snapshot_of_an_earlier_release_goes_on(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, ear: Ear, version: int, later: bool
) -> None:
    """`tests/data/snapshots` holds step 4 of 6 of this run, in each format of a snapshot."""
    if later:
        monkeypatch.setattr(run_module, "Run", LaterRun)
    technique = Lora(r=2, alpha=4, dropout=0.1, target_modules=["q_proj", "v_proj"])
    settled = plan(technique=technique, n_epochs=2, select="best", evaluation=Evaluation(max_new_tokens=64))
    whole, resumed = (lay_out(tmp_path / name, tiny, settled, ROWS, ROWS[:3]) for name in ("whole", "resumed"))
    shutil.copytree(SNAPSHOTS / str(version), resumed / "resume")

    carry_out(whole, MessageWriter(None), StopSignal())
    carry_out(resumed, MessageWriter(ear.descriptor), StopSignal())

    assert said(ear, "started")[0].first_step == 5
    found, wanted = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (resumed, whole))
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() < 1e-5, name
    assert [step["step"] for step in steps_of(resumed)] == [step["step"] for step in steps_of(whole)]


SNAPSHOTS = Path(__file__).parents[1] / "data" / "snapshots"


class LaterPlan(Plan):
    """A plan of a later release, with one more option."""

    label_smoothing: float = 0.0


class LaterRun(Run):
    plan: LaterPlan


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"technique": Lora(r=2, alpha=8, dropout=0.1, target_modules=["q_proj", "v_proj"])}, "technique"),
        ({"packing": True}, "packing"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_snapshot_of_another_plan_is_not_taken(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture, version: int, changes: dict[str, Any], reason: str
) -> None:
    technique = Lora(r=2, alpha=4, dropout=0.1, target_modules=["q_proj", "v_proj"])
    settled = plan(technique=technique, n_epochs=2, select="best", evaluation=Evaluation(max_new_tokens=64))
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, ROWS[:3])
    shutil.copytree(SNAPSHOTS / str(version), folder / "resume")
    t = prepare(folder, MessageWriter(None), StopSignal())
    assert checkpoints.find_snapshot(t) is not None

    other = replace(t, run=t.run.model_copy(update={"plan": LaterPlan(**settled.model_dump() | changes)}))

    assert checkpoints.find_snapshot(other) is None
    assert version == 1 or f"another {reason}" in caplog.text


def test_options_that_change_no_weight_leave_a_snapshot_good(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(), ROWS)
    stop_signal = StopSignal()
    carry_out(folder, Interrupting(1, stop_signal), stop_signal)
    t = prepare(folder, MessageWriter(None), StopSignal())

    scored = Evaluation(test_file="file-test", max_new_tokens=9, max_rows=5)
    other = replace(t, run=t.run.model_copy(update={"plan": plan(evaluation=scored, learning_rate_multiplier=3.0)}))

    assert checkpoints.find_snapshot(other) is not None


def test_a_packed_run_of_the_first_format_is_not_continued(tmp_path: Path, tiny: Path) -> None:
    """The first format counted a packed run's steps in packed sequences."""
    folder = lay_out(tmp_path / "run", tiny, plan(packing=True), ROWS)
    t = prepare(folder, MessageWriter(None), StopSignal())
    hashed = t.rows.digest(json.dumps([t.plan.model_dump(mode="json"), "tiny"]).encode())

    assert fingerprint.difference(t.run, t.rows, t.precision, {"run": hashed}) is not None


def test_snapshot_of_other_rows_is_not_taken(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(), ROWS)
    stop_signal = StopSignal()
    carry_out(folder, Interrupting(1, stop_signal), stop_signal)
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(chat(50 + i)) + "\n" for i in range(10)))

    assert checkpoints.find_snapshot(prepare(folder, MessageWriter(None), StopSignal())) is None
