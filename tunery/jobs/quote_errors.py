"""How far runs were from their quotes, over all succeeded jobs, as Prometheus metrics."""

from collections.abc import Iterator

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery.jobs.model import Job

BUCKETS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 4.0)
"""Bounds of the ratio of a run's seconds to the quoted ones: 0.8 to 1.2 is at most 20 % off."""
NAME = "tunery_job_seconds_over_quoted"
IN_RANGE = "tunery_jobs_in_quoted_range"


def as_text(session: Session) -> str:
    """Returns a histogram of actual over quoted seconds, and how many runs lay in the quoted range, by `speed_from`."""
    ratio, basis = Job.actual["of_quoted"].as_float(), Job.quote["speed_from"].astext
    counted = select(
        basis,
        *(func.count().filter(ratio <= bucket) for bucket in BUCKETS),
        func.count(),
        func.sum(ratio),
        func.count().filter(Job.actual["in_range"].as_boolean()),
    )
    measured = counted.where(func.jsonb_typeof(Job.actual["of_quoted"]) == "number").group_by(basis).order_by(basis)
    rows = [tuple(row) for row in session.execute(measured)]
    lines = [
        f"# HELP {NAME} Ratio of a run's seconds to the quoted seconds.",
        f"# TYPE {NAME} histogram",
        *(line for basis, *counts, total, together, _ in rows for line in _histogram(basis, counts, total, together)),
        f"# HELP {IN_RANGE} Runs whose seconds were in the quoted range.",
        f"# TYPE {IN_RANGE} counter",
        *(f'{IN_RANGE}{{speed_from="{row[0]}"}} {row[-1]}' for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _histogram(basis: str, counts: list[int], total: int, together: float) -> Iterator[str]:
    label = f'speed_from="{basis}"'
    for bucket, count in zip(BUCKETS, counts, strict=True):
        yield f'{NAME}_bucket{{{label},le="{bucket:g}"}} {count}'
    yield f'{NAME}_bucket{{{label},le="+Inf"}} {total}'
    yield f"{NAME}_sum{{{label}}} {together:.6g}"
    yield f"{NAME}_count{{{label}}} {total}"
