"""Quotes of jobs: from which files, devices and earlier runs; and what a run records for later quotes."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import rows
from sqlalchemy import text
from sqlalchemy.orm import Session

from tunery.datasets.model import FileReport
from tunery.jobs import leases, quoting
from tunery.jobs.model import Attempt, HostDevice, Job
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models.model import Model
from tunery.planning.quote import Actual, Quote
from tunery.planning.workload import Counts
from tunery.settings import Settings
from tunery.spec import Full, Lora, Technique
from tunery.trainer_protocol import Finished, Spent, StepTimes

GIB = 2**30
SETTINGS = Settings(gpu_hour_prices={"CPU": 3.6, "H200": 3.6})
LARGER = {**rows.MODEL_INFO, "num_hidden_layers": 20, "params": 1_500_000}


def show(session: Session, name: str = "CPU", *, index: int | None = None, gib: int = 200) -> None:
    id = f"h/{'cpu' if index is None else f'gpu{index}'}"
    device = HostDevice(id=id, host="h", gpu_index=index, device=name, memory_bytes=gib * GIB, bf16=True)
    leases.show_device(session, device)


def ended(
    session: Session,
    owner: Project,
    base: Model,
    *,
    device: str = "CPU",
    technique: Technique | None = None,
    start: float = 10,
    kept: bool = True,
) -> Job:
    """Makes a job whose run took `start` seconds, plus one second for each of its 100 tokens."""
    job = rows.job(session, owner, State.SUCCEEDED, base_model=base.id)
    job.plan = rows.plan(technique=technique or Lora()).model_dump(mode="json")
    finished = Finished(
        step=10, steps=10, trained_tokens=100, seconds=start + 100,
        spent={"prepare": Spent(seconds=start, units=1), "step": Spent(seconds=100, units=10)},
        step_times=StepTimes(steps=9, seconds=90, tokens=90, tokens_squared=900, seconds_tokens=900),
    )  # fmt: skip
    said = finished.model_dump(mode="json", include={"spent", "step_times", "steps", "trained_tokens"})
    said |= {"trainer_seconds": finished.seconds, "around": 0}
    job.actual = {"device": device, "gpus": 0 if device == "CPU" else 1, "kept": said if kept else None}
    session.flush()
    return job


def quote_of(session: Session, job: Job, technique: Technique | None = None, **counted: Any) -> Quote:
    counts = Counts(**{"examples": 20, "tokens": 200, "source": "rows", **counted})
    plan = rows.plan(technique=technique or Lora(), keep_checkpoints=0)
    found = quoting.of_plan(session, job, plan, counts, SETTINGS, devices=leases.devices(session))
    assert found is not None
    return found


@pytest.fixture
def owner(session: Session) -> Project:
    return rows.project(session)


def test_a_run_on_the_same_base_and_device_says_how_long(session: Session, owner: Project) -> None:
    show(session)
    base = rows.base(session)
    job = rows.job(session, owner, base_model=base.id)
    assert quote_of(session, job).speed_from == "estimated"
    earlier = ended(session, owner, base)
    found = quote_of(session, job)
    assert (found.speed_from, found.measured, found.device) == ("same", [earlier.id], "CPU")
    assert found.seconds.expected == pytest.approx(10 + 200)
    assert found.cost is not None
    assert found.cost.expected == pytest.approx(210 * 3.6 / 3600, abs=1e-3)


def test_the_nearest_run_is_taken_where_there_is_none_like_it(session: Session, owner: Project) -> None:
    show(session)
    small, larger = rows.base(session), rows.base(session, model_info=LARGER)
    job = rows.job(session, owner, base_model=larger.id)
    of_other = ended(session, owner, small)
    found = quote_of(session, job)
    assert (found.speed_from, found.measured) == ("other_base", [of_other.id])
    assert found.parts["training"] > 400  # ten times the layers
    of_technique = ended(session, owner, larger, technique=Full())
    assert (quote_of(session, job).speed_from, quote_of(session, job).measured) == (
        "other_technique",
        [of_technique.id],
    )
    assert quote_of(session, job, Full()).speed_from == "same"


@pytest.mark.parametrize(("times", "basis"), [(90, "other_base"), (110, "estimated")])
def test_a_run_on_a_far_smaller_base_says_nothing(session: Session, owner: Project, times: int, basis: str) -> None:
    show(session)
    small = rows.base(session)
    of_size = {**rows.MODEL_INFO, "params": times * rows.MODEL_INFO["params"]}
    ended(session, owner, small)
    job = rows.job(session, owner, base_model=rows.base(session, model_info=of_size).id)
    assert quote_of(session, job).speed_from == basis


@pytest.mark.parametrize("what", [{"device": "NVIDIA H200"}, {"kept": False}])
def test_runs_on_other_devices_and_broken_ones_say_nothing(
    session: Session, owner: Project, what: dict[str, Any]
) -> None:
    show(session)
    base = rows.base(session)
    ended(session, owner, base, **what)
    assert quote_of(session, rows.job(session, owner, base_model=base.id)).speed_from == "estimated"


def test_a_run_that_cannot_be_read_any_more_says_nothing(session: Session, owner: Project) -> None:
    show(session)
    base = rows.base(session)
    of_plugin = ended(session, owner, base)
    of_plugin.plan = {**(of_plugin.plan or {}), "method": {"type": "gone"}}
    session.flush()
    assert quote_of(session, rows.job(session, owner, base_model=base.id)).speed_from == "estimated"


def test_another_projects_run_counts_and_is_not_named(session: Session, owner: Project) -> None:
    show(session)
    mine, theirs = rows.base(session), rows.base(session, model_info=LARGER)
    foreign = ended(session, rows.project(session), theirs)
    found = quote_of(session, rows.job(session, owner, base_model=mine.id))
    assert (found.speed_from, found.measured) == ("other_base", [])
    assert "a base of 0.0015B parameters" in found.basis
    said = found.model_dump_json()
    assert foreign.id not in said
    assert theirs.id not in said


def test_the_smallest_card_that_will_do_is_quoted(session: Session, owner: Project) -> None:
    job = rows.job(session, owner)
    assert quote_of(session, job).device == "T4"  # no worker has registered: the smallest known card
    show(session)
    assert quote_of(session, job).device == "CPU"
    show(session, "NVIDIA H200", index=0, gib=140)
    show(session, "NVIDIA L4", index=1, gib=22)
    show(session, "Tesla T4", index=2, gib=0)  # too little memory
    assert quote_of(session, job).device == "NVIDIA L4"


def test_tokens_come_of_the_report_or_of_the_bytes(session: Session, owner: Project) -> None:
    show(session)
    job = rows.job(session, owner, training_file=rows.file(session, owner, bytes=24_000, sha256="c" * 64).id)
    guessed = quoting.first(session, job, SETTINGS)
    assert guessed is not None
    assert (guessed.tokens_from, guessed.tokens) == ("bytes", 6000 * 3)

    def report(base: str, summary: dict[str, Any], columns: dict[str, str] | None = None) -> None:
        values = {"project_id": owner.id, "sha256": "c" * 64, "version": 3, "status": "ready", "base": base}
        session.add(FileReport(id=f"report-{base}-{columns}", summary=summary, columns=columns or {}, **values))
        session.flush()

    report(job.base_model, {"examples": 9, "tokens": {"rows": 9, "total": 90}}, {"text": "Frage"})

    report("", {"examples": 1000})
    few = quoting.first(session, job, SETTINGS)
    assert few is not None
    assert (few.tokens_from, few.tokens) == ("bytes", 6000 * 3)
    report(job.base_model, {"examples": 1000, "tokens": {"rows": 500, "total": 4000}})
    counted = quoting.first(session, job, SETTINGS)
    assert counted is not None
    assert (counted.tokens_from, counted.tokens) == ("report", 8000 * 3)
    spec = job.spec
    job.spec = {**spec, "columns": {"text": "Frage"}}
    by_columns = quoting.first(session, job, SETTINGS)
    assert by_columns is not None
    assert (by_columns.tokens_from, by_columns.tokens) == ("report", 90 * 11)
    job.spec = spec
    quoting.keep_first(session, job, SETTINGS)
    assert (job.quote or {})["tokens"] == 8000 * 3
    job.plan = rows.plan().model_dump(mode="json")
    quoting.requote(session, job, Counts(20, 200, "rows"), SETTINGS)
    assert job.quote is not None
    assert (job.quote["tokens"], job.quote["at_creation"]) == (200, counted.seconds.model_dump())


def test_a_base_of_unknown_sizes_has_no_quote(session: Session, owner: Project) -> None:
    job = rows.job(session, owner, base_model=rows.base(session, model_info={}).id)
    assert quoting.first(session, job, SETTINGS) is None
    quoting.keep_first(session, job, SETTINGS)
    assert job.quote is None


def test_a_claim_expects_the_quotes_end_less_what_is_done(session: Session, owner: Project) -> None:
    show(session)
    base = rows.base(session)
    ended(session, owner, base)
    job = rows.job(session, owner, State.QUEUED, base_model=base.id)
    assert quoting.expected_finish(session, job) is None
    job.quote = quote_of(session, job).model_dump(mode="json")
    assert rows.claim(session) is not None
    session.refresh(job)
    assert job.estimated_finish is not None
    assert job.estimated_finish - datetime.now(UTC) == pytest.approx(timedelta(seconds=210), abs=timedelta(seconds=20))
    job.total_steps, job.snapshot_step = 10, 5
    resumed = quoting.expected_finish(session, job)
    assert resumed is not None
    assert resumed - datetime.now(UTC) == pytest.approx(timedelta(seconds=110), abs=timedelta(seconds=20))


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_end_keeps_what_the_next_quotes_are_made_of(session: Session, owner: Project, interrupted: bool) -> None:
    base = rows.base(session)
    job = rows.job(session, owner, State.QUEUED, base_model=base.id)
    job.quote = quote_of(session, job).model_copy(update={"device": "CPU"}).model_dump(mode="json")
    lease = rows.claim(session)
    assert lease is not None
    session.refresh(job)
    attempt = session.get_one(Attempt, lease.attempt_id)
    attempt.started_at = datetime.now(UTC) - timedelta(seconds=100)
    if interrupted:
        began = attempt.started_at - timedelta(seconds=80)
        before = Attempt(job_id=job.id, number=0, host="h", slot="s", gpu_indexes=[], outcome="crashed")
        before.started_at, before.ended_at = began, began + timedelta(seconds=50)
        session.add(before)
    session.flush()
    finished = Finished(step=9, steps=9, trained_tokens=90, seconds=80, spent={"step": Spent(seconds=60, units=9)})
    actual = quoting.conclude(session, job, lease, finished, SETTINGS)
    assert actual.seconds == pytest.approx(150 if interrupted else 100, abs=20)
    assert actual.cost == pytest.approx(actual.seconds / 1000, abs=1e-3)
    kept = (job.actual or {})["kept"]
    assert (kept is None) is interrupted
    assert quoting.conclude(session, job, lease, None, SETTINGS).of_quoted is None  # a run that failed
    assert (job.actual or {})["kept"] is None
    if not interrupted:
        assert kept["around"] == pytest.approx(actual.seconds - 80, abs=0.2)


@pytest.mark.parametrize("state", [State.CANCELLED, State.FAILED])
def test_a_run_that_nobody_concluded_has_cost_all_the_same(session: Session, owner: Project, state: State) -> None:
    job = rows.job(session, owner, state, base_model=rows.base(session).id)
    quoting.conclude_unfinished(session, job, SETTINGS)
    assert job.actual is None  # no worker has run it
    began = datetime.now(UTC) - timedelta(hours=1)
    for number, seconds in [(1, 50), (2, 100)]:
        attempt = Attempt(job_id=job.id, number=number, host="h", slot="s", gpu_indexes=[2, 3], outcome="lost")
        attempt.started_at, attempt.ended_at = began, began + timedelta(seconds=seconds)
        session.add(attempt)
    job.progress = {"device": "NVIDIA H200"}
    session.flush()
    quoting.conclude_unfinished(session, job, SETTINGS)
    actual = Actual.model_validate(job.actual)
    assert (actual.device, actual.gpus, actual.seconds) == ("NVIDIA H200", 2, 150)
    assert actual.cost == pytest.approx(2 * 150 * 3.6 / 3600)
    assert (actual.of_quoted, actual.in_range) == (None, None)
    assert quote_of(session, job).speed_from == "estimated"  # it is no measurement for other runs
    job.actual = {"kept": 1}
    quoting.conclude_unfinished(session, job, SETTINGS)
    assert job.actual == {"kept": 1}


def test_earlier_runs_are_found_by_their_index(session: Session, owner: Project) -> None:
    ended(session, owner, rows.base(session))
    session.execute(text("SET LOCAL enable_seqscan = off"))
    query = quoting._measured("CPU", Job.base_model == "x").compile(
        session.get_bind(), compile_kwargs={"literal_binds": True}
    )
    plan = "\n".join(session.scalars(text(f"EXPLAIN {query}".replace(":", "\\:"))))
    assert "ix_jobs_measured" in plan
