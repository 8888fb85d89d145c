"""Attempts without a trainer: what is recorded from a trainer's messages, and what an attempt leaves behind."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import rows
from sqlalchemy import select, update
from workshop import Workshop

from tunery import trainer_protocol as protocol
from tunery.jobs import leases, ledger
from tunery.jobs.errors import LeaseLost
from tunery.jobs.leases import Lease
from tunery.jobs.model import Attempt, Checkpoint, Job, Metric
from tunery.models.model import Model
from tunery.planning.quote import Actual, Quote
from worker.supervisor import attempt, staging
from worker.supervisor.drain import Drain
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.process import Trainers
from worker.supervisor.run_recorder import RunRecorder
from worker.supervisor.upload import UploadPace

NUL_ANSWER = b"""{"type": "score", "rows": 1, "base_exact": 0, "tuned_exact": 1, "gain": 1, "gain_low": 1,
 "gain_high": 1, "samples": [{"prompt": "\\\\u0000", "base": "a\\u0000b\\\\\\u0000", "wanted": "", "tuned": ""}],
 "labels": {"\\u0000": {"rows": 1, "base": 0, "tuned": 1}}}"""
"""A message in which an escaped backslash before `u0000` is text, and NUL is alone, after a backslash and in a key."""


STEP = protocol.Step(
    step=1, epoch=1, train_loss=2.5, train_accuracy=0.5, learning_rate=0.001, grad_norm=1, tokens=10, seconds=1
)


def _recorder(keeper: LeaseKeeper, workshop: Workshop, keep: int = 3) -> RunRecorder:
    return RunRecorder(keeper, workshop.settings, workshop.storage, workshop.folder / "run", keep=keep)


def test_a_nul_in_a_models_answer_is_written_as_a_replacement_character(workshop: Workshop, lease: Lease) -> None:
    with LeaseKeeper(lease, workshop.settings, Drain()) as keeper, _recorder(keeper, workshop) as recorder:
        recorder.record(protocol.parse(NUL_ANSWER))
    card = workshop.job(lease.job_id).scorecard
    assert card is not None
    assert card["samples"] == [{"prompt": "\\u0000", "wanted": "", "base": "a\ufffdb\\\ufffd", "tuned": ""}]
    assert list(card["labels"]) == ["\ufffd"]


def test_story_says_what_was_exported_and_what_was_refused(workshop: Workshop, lease: Lease) -> None:
    with LeaseKeeper(lease, workshop.settings, Drain()) as keeper, _recorder(keeper, workshop) as recorder:
        recorder.record(protocol.Exported(path="merged", message="It predicts alike"))
        recorder.record(protocol.Exported(path="gguf", message="It does not", is_refused=True))
    assert workshop.story(lease.job_id)[-2:] == [
        "Export merged written: It predicts alike",
        "Export gguf not written: It does not",
    ]


def _save_epochs(workshop: Workshop, recorder: RunRecorder, losses: list[float], scores: list[float]) -> None:
    """Records a trainer's messages of epochs of one step each, and waits until their checkpoints are stored."""
    for step, (loss, score) in enumerate(zip(losses, scores, strict=True), start=1):
        folder = workshop.folder / "run" / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        recorder.record(STEP.model_copy(update={"step": step}))
        recorder.record(protocol.Evaluated(step=step, loss=loss, accuracy=0.5, task_metric="exact", task_score=score))
        recorder._flush()  # as happens each second: the step's row is written before its checkpoint is saved
        recorder.record(protocol.CheckpointSaved(kind="public", step=step, path=f"checkpoints/step-{step}"))
    recorder.close()


@pytest.mark.parametrize(
    ("stopping", "kept"), [(None, [1, 4, 5]), ({"metric": "task"}, [2, 4, 5])], ids=["by loss", "by task"]
)
def test_the_best_checkpoint_and_the_newest_stay(
    workshop: Workshop, lease: Lease, stopping: dict[str, Any] | None, kept: list[int]
) -> None:
    with workshop.session() as session:
        job = session.get_one(Job, lease.job_id)
        job.plan = {**(job.plan or {}), "early_stopping": stopping}

    with LeaseKeeper(lease, workshop.settings, Drain()) as keeper, _recorder(keeper, workshop, keep=2) as recorder:
        _save_epochs(workshop, recorder, losses=[0.5, 0.8, 0.7, 0.9, 0.6], scores=[0.1, 0.4, 0.4, 0.2, 0.3])

    with workshop.session() as session:
        found = session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == lease.job_id).order_by(Checkpoint.step)
        ).all()
        models = session.scalars(select(Model).where(Model.job_id == lease.job_id, Model.kind == "checkpoint")).all()
    assert [checkpoint.step for checkpoint in found] == kept
    assert all("full_valid_loss" in checkpoint.metrics for checkpoint in found)
    left = {model.id for model in models if list(workshop.storage.list(model.prefix))}
    assert left == {checkpoint.model_id for checkpoint in found}


def _save_snapshots(workshop: Workshop, lease: Lease, steps: list[int]) -> None:
    """Stores a trainer's snapshots, of which the newest has one more file, and requeues the job."""
    with LeaseKeeper(lease, workshop.settings, Drain()) as keeper, _recorder(keeper, workshop) as recorder:
        for step in steps:
            folder = workshop.folder / "run" / "snapshots" / f"step-{step}"
            folder.mkdir(parents=True)
            names = ["weights.safetensors", *(["best.safetensors"] if step == steps[-1] else [])]
            for name in names:
                (folder / name).write_bytes(f"{name} of step {step}".encode())
            recorder.record(protocol.CheckpointSaved(kind="snapshot", step=step, path=f"snapshots/step-{step}"))
        recorder.close()
    with workshop.session() as session:
        leases.requeue(session, lease, reason="lost", outcome="crashed")


def _damage(workshop: Workshop, lease: Lease, step: int) -> None:
    key = f"jobs/{lease.job_id}/{lease.number}/snapshots/step-{step}/weights.safetensors"
    found = b"".join(workshop.storage.read(key))
    workshop.storage.put(key, found[:-1] + b"?")


@pytest.mark.parametrize(
    ("damaged", "resumed", "note"),
    [
        ([], 6, None),
        ([6], 4, "The state saved at step 6 is damaged in storage. The run resumes from the state of step 4."),
        ([6, 4], None, "The state saved at step 6 is damaged in storage, and no other saved state is intact. The run "
         "starts again from the first step."),
    ],
    ids=["whole", "newest damaged", "all damaged"],
)  # fmt: skip
def test_a_run_goes_on_from_the_snapshot_before_a_damaged_one(
    workshop: Workshop, lease: Lease, damaged: list[int], resumed: int | None, note: str | None
) -> None:
    _save_snapshots(workshop, lease, [2, 4, 6])
    for step in damaged:
        _damage(workshop, lease, step)
    with workshop.session() as session:
        needs = staging.needs_of(session, session.get_one(Job, lease.job_id))
    run_dir = workshop.folder / "next"

    found = staging.lay_out(needs, run_dir, workshop.settings.models_dir, workshop.storage, lambda: None)

    assert found == note
    assert (run_dir / "prepared").resolve() == (workshop.settings.models_dir / "prepared").resolve()
    weights = run_dir / "resume" / "weights.safetensors"
    assert (weights.read_text() if weights.exists() else None) == (
        f"weights.safetensors of step {resumed}" if resumed else None
    )
    assert (run_dir / "resume" / "best.safetensors").exists() == (resumed == 6)
    kept = {key.split("/")[4] for key in workshop.storage.list(f"jobs/{lease.job_id}/") if "/snapshots/" in key}
    assert kept == {"step-4", "step-6"}, "the one before the newest stays, and no other"


@pytest.mark.slow
def test_the_owner_reads_that_a_snapshot_was_damaged(workshop: Workshop, lease: Lease) -> None:
    _save_snapshots(workshop, lease, [2])
    _damage(workshop, lease, 2)
    with workshop.session() as session:
        later = rows.claim(session)
    assert later is not None

    attempt.run(later, settings=workshop.settings, storage=workshop.storage, drain=Drain(), trainers=Trainers("test"))

    assert workshop.job(lease.job_id).state == "succeeded"
    assert any(line.startswith("The state saved at step 2 is damaged") for line in workshop.story(lease.job_id))


def test_a_step_that_is_measured_again_has_the_newest_attempts_values(workshop: Workshop, lease: Lease) -> None:
    """A later attempt has resumed from a snapshot; an older one, which has lost the job, can write no metrics."""
    with LeaseKeeper(lease, workshop.settings, Drain()) as keeper, _recorder(keeper, workshop) as recorder:
        for step in (1, 2, 3):
            recorder.record(STEP.model_copy(update={"step": step}))
        recorder.close()
    with workshop.session() as session:
        leases.requeue(session, lease, reason="lost", outcome="crashed")
    with workshop.session() as session:
        later = rows.claim(session)
    assert later is not None

    with LeaseKeeper(later, workshop.settings, Drain()) as keeper, _recorder(keeper, workshop) as recorder:
        recorder.record(STEP.model_copy(update={"step": 2, "train_loss": 1.5}))
        recorder.close()
    with workshop.session() as session, pytest.raises(LeaseLost):
        leases.record_metrics(session, lease, {2: {"train_loss": 9.0}})

    with workshop.session() as session:
        found = session.scalars(select(Metric).where(Metric.job_id == lease.job_id).order_by(Metric.step)).all()
    assert [(row.step, row.values["train_loss"]) for row in found] == [(1, 2.5), (2, 1.5), (3, 2.5)]


def _finish(workshop: Workshop, lease: Lease) -> float:
    """Returns the seconds from now to the job's estimated end."""
    finish = workshop.job(lease.job_id).estimated_finish
    assert finish is not None
    return (finish - datetime.now(UTC)).total_seconds()


def test_the_estimated_finish_counts_what_follows_the_last_step(workshop: Workshop, lease: Lease) -> None:
    """The trainer reports the time that it has left, and the supervisor adds the time of storing the model."""
    started = protocol.Started(
        trainable_params=50_000_000, all_params=50_000_000, total_steps=1, first_step=1, examples=1, train_tokens=1,
        device="cpu",
    )  # fmt: skip
    with LeaseKeeper(lease, workshop.settings, Drain()) as keeper, _recorder(keeper, workshop) as recorder:
        recorder.record(protocol.Phase(phase="loading"))
        quoted = Quote.model_validate(workshop.job(lease.job_id).quote).seconds.expected
        assert quoted - 30 < _finish(workshop, lease) <= quoted  # the quote's, until the trainer says more
        recorder.record(started)
        recorder.record(protocol.Phase(phase="evaluating", seconds_left=1000))
        assert 990 < _finish(workshop, lease) - 4 <= 1000  # 200 MB of fp32
        recorder.record(protocol.Phase(phase="saving", seconds_left=100))
        assert 90 < _finish(workshop, lease) - 4 <= 100
        recorder.announce("uploading")
        assert 0 < _finish(workshop, lease) <= 4


def test_a_run_that_fails_has_what_it_took(workshop: Workshop, lease: Lease) -> None:
    failed = protocol.Failed(kind="user_error", code="invalid_spec", message="no such layer")
    with workshop.database.sessions.begin() as session:
        session.execute(update(Attempt).values(started_at=Attempt.started_at - timedelta(seconds=7)))
    with LeaseKeeper(lease, workshop.settings, Drain()) as keeper:
        keeper.write(attempt._fail(keeper, failed, workshop.settings))
    job = workshop.job(lease.job_id)
    assert (job.state, job.error_code) == ("failed", "job_failed")
    actual = Actual.model_validate(job.actual)
    assert (actual.device, actual.of_quoted, actual.in_range) == ("CPU", None, None)
    assert 7 <= actual.seconds < 60
    assert any(line.startswith("The run took ") for line in workshop.story(job.id))


def test_uploads_take_as_long_as_those_before() -> None:
    pace = UploadPace()
    assert pace.seconds(100_000_000) == pytest.approx(2)
    pace.note(10_000_000, 5)
    pace.note(10_000_000, 1)
    assert pace.seconds(100_000_000) == pytest.approx(30)


def test_a_fault_of_the_worker_is_reported_without_its_text(
    workshop: Workshop, lease: Lease, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workshop.settings.runs_dir.write_text("a file where a folder should be")
    attempt.run(lease, settings=workshop.settings, storage=workshop.storage, drain=Drain(), trainers=Trainers("test"))
    job = workshop.job(lease.job_id)
    assert (job.state, job.failures) == ("queued", 1)
    assert f"attempt 1 of {job.id} has ended: crashed; the job is queued" in caplog.messages
    (events,) = [line for line in workshop.story(job.id) if line.startswith("Training failed")]
    assert "the worker failed with NotADirectoryError" in events
    assert str(workshop.folder) not in events


def test_an_attempt_that_finds_its_job_gone_has_it_tidied_again(workshop: Workshop, lease: Lease) -> None:
    with workshop.session() as session:
        job = session.get_one(Job, lease.job_id)
        ledger.cancel(session, job.project_id, job.id)
        leases.end_attempt(session, lease, "lost")
        job.storage_cleaned = True
    attempt.run(lease, settings=workshop.settings, storage=workshop.storage, drain=Drain(), trainers=Trainers("test"))
    assert not workshop.job(lease.job_id).storage_cleaned
    assert workshop.attempts(lease.job_id)[0].outcome == "lost"


def test_a_cancel_breaks_off_the_fetch_of_the_base(workshop: Workshop, lease: Lease) -> None:
    with workshop.session() as session:
        needs = staging.needs_of(session, leases.held(session, lease))
    run_dir, models_dir = workshop.folder / "run", workshop.settings.models_dir

    def check() -> None:
        if (models_dir / needs.base.sha256).exists():  # the fetch has begun
            raise LeaseLost(job=lease.job_id, attempt=lease.number)

    with pytest.raises(LeaseLost):
        staging.lay_out(needs, run_dir, models_dir, workshop.storage, check)
    assert list((models_dir / needs.base.sha256).iterdir()) == []
