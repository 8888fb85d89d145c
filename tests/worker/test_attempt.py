"""One attempt's deeds without its trainer: what is written of what was said, and what an attempt leaves behind."""

from datetime import UTC, datetime

import pytest
import rows
from workshop import Workshop, training_rows

from tunery import wire
from tunery.jobs import leases, ledger
from tunery.jobs.errors import LeaseLost
from tunery.jobs.leases import Lease
from tunery.jobs.model import Job
from worker.io import validation
from worker.supervisor import attempt, staging
from worker.supervisor.deeds import Scribe
from worker.supervisor.drain import Drain
from worker.supervisor.lease import Hold
from worker.supervisor.process import Trainers
from worker.supervisor.upload import UploadPace

NUL_ANSWER = b"""{"type": "score", "rows": 1, "base_exact": 0, "tuned_exact": 1, "gain": 1, "gain_low": 1,
 "gain_high": 1, "samples": [{"prompt": "\\\\u0000", "base": "a\\u0000b\\\\\\u0000", "\\u0000": null}]}"""
"""An escaped backslash before `u0000` is text; NUL itself comes alone, behind a backslash, and in a key."""


@pytest.fixture
def lease(workshop: Workshop) -> Lease:
    """A validated job's, claimed by this process."""
    workshop.submit(workshop.file(training_rows(12)))
    assert validation.validate_next(workshop.settings, workshop.storage)
    with workshop.session() as session:
        claimed = rows.claim(session)
    assert claimed is not None
    return claimed


def _scribe(hold: Hold, workshop: Workshop) -> Scribe:
    return Scribe(hold, workshop.settings, workshop.storage, workshop.folder / "run", keep=3)


def test_a_nul_in_a_models_answer_is_written_as_a_replacement_character(workshop: Workshop, lease: Lease) -> None:
    with Hold(lease, workshop.settings, Drain()) as hold, _scribe(hold, workshop) as scribe:
        scribe.hear(wire.parse(NUL_ANSWER))
    card = workshop.job(lease.job_id).scorecard
    assert card is not None
    assert card["samples"] == [{"prompt": "\\u0000", "base": "a\ufffdb\\\ufffd", "\ufffd": None}]


def test_story_says_what_was_exported_and_what_was_refused(workshop: Workshop, lease: Lease) -> None:
    with Hold(lease, workshop.settings, Drain()) as hold, _scribe(hold, workshop) as scribe:
        scribe.hear(wire.Exported(path="merged", message="It predicts alike"))
        scribe.hear(wire.Exported(path="gguf", message="It does not", is_refused=True))
    assert workshop.story(lease.job_id)[-2:] == [
        "Export merged written: It predicts alike",
        "Export gguf not written: It does not",
    ]


def _finish(workshop: Workshop, lease: Lease) -> float:
    """Seconds from now to the job's estimated end."""
    finish = workshop.job(lease.job_id).estimated_finish
    assert finish is not None
    return (finish - datetime.now(UTC)).total_seconds()


def test_the_estimated_finish_counts_what_follows_the_last_step(workshop: Workshop, lease: Lease) -> None:
    """The trainer says what it has left, and the supervisor adds the time in which the model is stored."""
    started = wire.Started(
        trainable_params=50_000_000, all_params=50_000_000, total_steps=1, first_step=1, examples=1, train_tokens=1,
        device="cpu",
    )  # fmt: skip
    with Hold(lease, workshop.settings, Drain()) as hold, _scribe(hold, workshop) as scribe:
        scribe.hear(wire.Phase(phase="loading"))
        assert workshop.job(lease.job_id).estimated_finish is None
        scribe.hear(started)
        scribe.hear(wire.Phase(phase="evaluating", seconds_left=1000))
        assert 990 < _finish(workshop, lease) - 4 <= 1000  # 200 MB of fp32
        scribe.hear(wire.Phase(phase="saving", seconds_left=100))
        assert 90 < _finish(workshop, lease) - 4 <= 100
        scribe.announce_upload()
        assert 0 < _finish(workshop, lease) <= 4


def test_uploads_take_as_long_as_those_before() -> None:
    pace = UploadPace()
    assert pace.seconds(100_000_000) == pytest.approx(2)
    pace.note(10_000_000, 5)
    pace.note(10_000_000, 1)
    assert pace.seconds(100_000_000) == pytest.approx(30)


def test_a_fault_of_the_worker_is_told_without_its_text(workshop: Workshop, lease: Lease) -> None:
    workshop.settings.runs_dir.write_text("a file where a folder should be")
    attempt.run(lease, settings=workshop.settings, storage=workshop.storage, drain=Drain(), trainers=Trainers("test"))
    job = workshop.job(lease.job_id)
    assert (job.state, job.failures) == ("queued", 1)
    (told,) = [line for line in workshop.story(job.id) if line.startswith("Training broke off")]
    assert "the worker met NotADirectoryError" in told
    assert str(workshop.folder) not in told


def test_an_attempt_that_finds_its_job_gone_has_it_tidied_again(workshop: Workshop, lease: Lease) -> None:
    with workshop.session() as session:
        job = session.get_one(Job, lease.job_id)
        ledger.cancel(session, job.project_id, job.id)
        leases.end_attempt(session, lease, "lost")
        job.tidied = True
    attempt.run(lease, settings=workshop.settings, storage=workshop.storage, drain=Drain(), trainers=Trainers("test"))
    assert not workshop.job(lease.job_id).tidied
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
