"""Quotes held against real jobs on a CPU, in seconds of the processor: other tests take the machine's time."""

import pytest
from workshop import Workshop, training_rows

from bench.quotes import GOAL, compare, measured
from tunery.planning.quote import Quote

PASSED = {"n_epochs": 1, "batch_size": 8}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jobs_take_what_they_are_quoted_after_one_run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_PLUGINS", "bench.cpu_clock")
    workshop.start("io")
    workshop.start("train")
    valid, test = (workshop.file(training_rows(16, first=first)) for first in (10_000, 20_000))

    def run(rows: int, *, first: int, test_file: str | None = None, **knobs: int) -> str:
        training = workshop.file(training_rows(rows, first=first))
        job_id = workshop.submit(training, valid, test_file, hyperparameters=PASSED | knobs)
        workshop.until_state(job_id, "succeeded", seconds=1200)
        return job_id

    calibration_id = run(1200, first=0, test_file=test)
    _, calibration = measured(calibration_id, 16)
    for what, test_rows, job_id in (
        ("twice the rows", 0, run(2400, first=3000)),
        ("two epochs of few rows", 16, run(800, first=8000, test_file=test, n_epochs=2)),
    ):
        job, record = measured(job_id, test_rows)
        found = compare(what, job, record, calibration)
        assert abs(found["error"]) <= GOAL, found
        quoted = Quote.model_validate(job.quote)
        assert (quoted.speed_from, quoted.tokens_from) == ("same", "rows")
        assert calibration_id in quoted.measured
        assert quoted.tokens == job.trained_tokens
