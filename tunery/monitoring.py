"""The state of the service as Prometheus metrics, for alerts. It is read from the database at every scrape, so all API
processes answer alike.

Counters only grow, except that erasing a project takes its part out, which Prometheus treats like a restart. Rows that
are removed after some days, such as webhook deliveries, are counted by gauges.
"""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Select, case, func, select
from sqlalchemy.orm import Session

from tunery.exposition import family, histogram
from tunery.failures import JobFailure
from tunery.jobs import leases, quote_errors
from tunery.jobs.model import Attempt, HostDevice, Job
from tunery.jobs.states import FINAL, TRANSITIONS, State
from tunery.traffic.model import ModelUsage
from tunery.webhooks.model import Delivery, WebhookEndpoint
from tunery.webhooks.outbox import DELAYS

SECONDS = (10, 30, 60, 300, 900, 3600, 14_400, 43_200, 86_400, 259_200, 604_800)
"""Bounds of the histograms of times: ten seconds to a week."""
_SILENT_SECONDS = 300
"""A worker shows its devices every minute."""
_OUTCOMES = (
    *("succeeded", "paused", "preempted", "dropped", "lost", "crashed"),
    *("failed", "user_error", "nan_loss", "gpu_oom"),
)
"""Ends of attempts that have a sample from the start: an increase from no sample to 1 would not be seen."""


def as_text(session: Session) -> str:
    """Returns all metrics in Prometheus' text format."""
    parts = (_jobs, _queues, _times, _attempts, _devices, _webhooks, _traffic, quote_errors.lines)
    return "\n".join(line for part in parts for line in part(session)) + "\n"


def _jobs(session: Session) -> Iterator[str]:
    counts = session.execute(select(Job.state, Job.error_code, func.count()).group_by(Job.state, Job.error_code))
    found = {(state, code or ""): count for state, code, count in counts}
    yield from family(
        "tunery_jobs",
        "gauge",
        "Jobs that have not ended, by state.",
        (({"state": state}, found.get((state, ""), 0)) for state in TRANSITIONS if state not in FINAL),
    )
    failures: list[type[JobFailure]] = [JobFailure, *JobFailure.__subclasses__()]
    known = [("succeeded", ""), ("cancelled", ""), *(("failed", kind.code) for kind in failures)]
    ends = dict.fromkeys(known, 0)
    ends |= {end: count for end, count in found.items() if end[0] in FINAL}
    yield from family(
        "tunery_jobs_ended_total",
        "counter",
        "Jobs that have ended, by state and, if they failed, error code.",
        (({"state": state, "code": code}, count) for (state, code), count in sorted(ends.items())),
    )


def _queues(session: Session) -> Iterator[str]:
    waiting = (State.VALIDATING, State.QUEUED)
    since = _epoch(func.clock_timestamp() - func.min(func.coalesce(Job.queued_at, Job.created_at)))
    found = session.execute(select(Job.state, since).where(Job.state.in_(waiting)).group_by(Job.state))
    seconds = {state: float(age) for state, age in found}
    yield from family(
        "tunery_oldest_waiting_job_seconds",
        "gauge",
        "Time for which the oldest job has been waiting: for an I/O worker (validating_files) or a device (queued).",
        (({"state": state}, seconds.get(state, 0)) for state in waiting),
    )


def _times(session: Session) -> Iterator[str]:
    first = select(Attempt.job_id, func.min(Attempt.started_at).label("at")).group_by(Attempt.job_id).subquery()
    waited = select(_epoch(first.c.at - Job.created_at).label("seconds")).join(first, first.c.job_id == Job.id)
    yield from histogram(
        "tunery_job_wait_seconds",
        "Time from a job's creation to the start of its first attempt.",
        SECONDS,
        [({}, *_spread(session, waited))],
    )
    lasted = select(_epoch(Job.finished_at - Job.created_at).label("seconds"))
    yield from histogram(
        "tunery_job_duration_seconds",
        "Time from a job's creation to its end, by state.",
        SECONDS,
        (({"state": state}, *_spread(session, lasted.where(Job.state == state))) for state in sorted(FINAL)),
    )


def _epoch(interval: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.extract("epoch", interval)


def _spread(session: Session, times: Select[Any]) -> tuple[list[int], int, float]:
    """Returns how many of the `seconds` are at most each of SECONDS, how many there are, and their sum."""
    seconds = times.subquery().c.seconds
    counts = [func.count().filter(seconds <= bound) for bound in SECONDS]
    *found, total, together = session.execute(select(*counts, func.count(), func.sum(seconds))).one()
    return found, total, float(together or 0)


def _attempts(session: Session) -> Iterator[str]:
    ended = select(Attempt.outcome, func.count()).where(Attempt.ended_at.is_not(None)).group_by(Attempt.outcome)
    counts = dict.fromkeys(_OUTCOMES, 0) | {outcome or "": count for outcome, count in session.execute(ended)}
    yield from family(
        "tunery_attempts_ended_total",
        "counter",
        "Attempts at jobs that have ended, by outcome: a job that is resumed or tried again has several.",
        (({"outcome": outcome}, count) for outcome, count in sorted(counts.items())),
    )


def _devices(session: Session) -> Iterator[str]:
    live = session.execute(select(Attempt.host, Attempt.gpu_indexes).where(Attempt.ended_at.is_(None)))
    busy: set[tuple[str, int | None]] = set()
    for host, indexes in live:
        busy |= {(host, index) for index in indexes} or {(host, None)}  # without GPUs it is on the host's CPU
    seen = {device.id for device in leases.devices(session, fresh_seconds=_SILENT_SECONDS)}

    def status(device: HostDevice) -> str:
        is_stopped = device.stopped_at is not None and device.stopped_at > device.seen_at
        if device.id not in seen and not is_stopped:
            return "silent"
        if (device.host, device.gpu_index) in busy:
            return "busy"
        return "stopped" if is_stopped else "free"

    yield from family(
        "tunery_devices",
        "gauge",
        "Devices that training workers offered within the last hour: busy, free, stopped or silent for five minutes.",
        (
            (
                {
                    "host": device.host,
                    "gpu": "" if device.gpu_index is None else str(device.gpu_index),
                    "device": device.device,
                    "status": status(device),
                },
                1,
            )
            for device in leases.devices(session)
        ),
    )


def _webhooks(session: Session) -> Iterator[str]:
    gave_up = Delivery.tries >= len(DELAYS)
    dropped = (Delivery.state == "failed") & ~gave_up  # its endpoint was deleted, or answered 410
    named = case((dropped, "dropped"), else_=Delivery.state).label("named")
    counts = {state: int(count) for state, count in session.execute(select(named, func.count()).group_by(named))}
    yield from family(
        "tunery_webhook_deliveries",
        "gauge",
        "Stored webhook deliveries by state; ended ones are removed after TUNERY_KEEP_DELIVERIES_DAYS.",
        (({"state": state}, counts.get(state, 0)) for state in ("pending", "delivered", "failed", "dropped")),
    )
    disabled = WebhookEndpoint.disabled_at.is_not(None)
    endpoints = select(func.count().filter(~disabled), func.count().filter(disabled))
    active, gone = session.execute(endpoints.where(WebhookEndpoint.deleted_at.is_(None))).one()
    yield from family(
        "tunery_webhook_endpoints",
        "gauge",
        "Webhook endpoints by status; a receiver that answers 410 disables its own.",
        [({"status": "active"}, active), ({"status": "disabled"}, gone)],
    )


def _traffic(session: Session) -> Iterator[str]:
    sums = (
        func.sum(column) for column in (ModelUsage.requests, ModelUsage.prompt_tokens, ModelUsage.completion_tokens)
    )
    requests, prompt, completion = (int(found or 0) for found in session.execute(select(*sums)).one())
    yield from family("tunery_model_requests_total", "counter", "Requests to models.", [({}, requests)])
    yield from family(
        "tunery_model_tokens_total",
        "counter",
        "Tokens of requests to models.",
        [({"kind": "prompt"}, prompt), ({"kind": "completion"}, completion)],
    )
