"""How far runs were from their quotes, over all succeeded jobs, as Prometheus metrics."""

from collections.abc import Iterator

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import exposition
from tunery.jobs.model import Job

BUCKETS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 4.0)
"""Bounds of the ratio of a run's seconds to the quoted ones: 0.8 to 1.2 is at most 20 % off."""
NAME = "tunery_job_actual_to_quoted_ratio"
IN_RANGE = "tunery_jobs_in_quoted_range_total"


def lines(session: Session) -> Iterator[str]:
    """Yields a histogram of actual over quoted seconds, and how many runs lay in the quoted range, by `speed_from`."""
    ratio, basis = Job.actual["of_quoted"].as_float(), Job.quote["speed_from"].astext
    counted = select(
        basis,
        *(func.count().filter(ratio <= bucket) for bucket in BUCKETS),
        func.count(),
        func.sum(ratio),
        func.count().filter(Job.actual["in_range"].as_boolean()),
    )
    measured = counted.where(func.jsonb_typeof(Job.actual["of_quoted"]) == "number").group_by(basis).order_by(basis)
    rows = [({"speed_from": basis}, found) for basis, *found in session.execute(measured)]
    ratios = ((labels, counts, total, together) for labels, (*counts, total, together, _) in rows)
    yield from exposition.histogram(NAME, "Ratio of a run's seconds to the quoted seconds.", BUCKETS, ratios)
    in_range = ((labels, found[-1]) for labels, found in rows)
    yield from exposition.family(IN_RANGE, "counter", "Runs whose seconds were in the quoted range.", in_range)
