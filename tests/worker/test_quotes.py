"""Compares quotes with real jobs on a CPU, in processor time, as other tests use the machine at the same time.

A loaded machine stretches processor time too, by up to a third here, as its processes share caches. So every job runs
in three rounds, each quoted by its own round's calibration, and the median of its errors counts.
"""

import json
from collections import defaultdict
from statistics import median
from typing import Any

import pytest
from workshop import Workshop, training_rows

from bench.quotes import GOAL, compare, measured
from tunery.planning.quote import Quote
from tunery.planning.speed import Record

ROUNDS = 3
PASSED = {"n_epochs": 1, "batch_size": 8}
PAIRS = {"method": {"type": "dpo"}}


def pairs(count: int, first: int) -> bytes:
    """Returns rows like `training_rows`, as pairs with the question's own number as the worse answer."""
    lines = []
    for number in range(first, first + count):
        asked = [{"role": "user", "content": f"What comes after {number}?"}]
        answers = {"preferred_output": f"{number + 1}", "non_preferred_output": f"{number}"}
        said = {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
        lines.append(json.dumps({"input": {"messages": asked}, **said}))
    return ("\n".join(lines) + "\n").encode()


class Runs:
    """Runs jobs, each on its own rows: rows that were prepared for one job would be reused by the next."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop, self._next = workshop, 0

    def run(self, rows: int, test_rows: int = 0, **changes: Any) -> tuple[str, Record]:
        """Runs a job; returns its id, and its record with the work that it had."""
        test = self._file(test_rows, changes) if test_rows else None
        asked = {"hyperparameters": PASSED, **changes}
        job_id = self._workshop.submit(self._file(rows, changes), self._file(16, changes), test, **asked)
        self._workshop.until_state(job_id, "succeeded", seconds=1200)
        return job_id, measured(job_id, test_rows)[1]

    def _file(self, count: int, changes: dict[str, Any]) -> str:
        self._next += 10_000
        made = pairs if "method" in changes else training_rows
        return self._workshop.file(made(count, first=self._next))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jobs_take_what_they_are_quoted_after_one_run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_PLUGINS", "bench.cpu_clock")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several spend processor time on waiting for each other
    workshop.start("io")
    workshop.start("train")
    runs, errors = Runs(workshop), defaultdict[str, list[dict[str, Any]]](list)
    for _ in range(ROUNDS):
        for calibration, jobs in (
            (
                {"rows": 1200, "test_rows": 16},
                {
                    "twice the rows": {"rows": 2400},
                    "two epochs of few rows": {
                        "rows": 800, "test_rows": 16, "hyperparameters": PASSED | {"n_epochs": 2},
                    },
                },
            ),
            (
                {"rows": 400, "test_rows": 16, **PAIRS},
                {"pairs, ten times as many to compare": {"rows": 300, "test_rows": 160, **PAIRS}},
            ),
        ):  # fmt: skip
            calibration_id, calibrated = runs.run(**calibration)
            for what, asked in jobs.items():
                job_id, record = runs.run(**asked)
                job = workshop.job(job_id)
                errors[what].append(compare(what, job, record, calibrated))
                quoted = Quote.model_validate(job.quote)
                assert (quoted.speed_from, quoted.tokens_from) == ("same", "rows")
                assert calibration_id in quoted.measured
                assert quoted.tokens == job.trained_tokens
    print({what: [each["error"] for each in found] for what, found in errors.items()})
    for found in errors.values():
        assert abs(median(each["error"] for each in found)) <= GOAL, found
