"""Baselines: requested here, measured by an I/O worker, stored with their results."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.baselines.model import Baseline
from tunery.baselines.order import Order
from tunery.datasets import files
from tunery.datasets.model import File
from tunery.errors import InvalidValue, NotFound, WrongState
from tunery.jobs import ledger as jobs
from tunery.jobs.errors import QuotaExceeded
from tunery.models.model import Model
from tunery.paging import page

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
LIVE = (QUEUED, RUNNING)
MOST_LIVE = 4
"""Maximum unfinished baselines of a project, as each occupies a worker for minutes."""
MAX_TRIES = 3
"""Workers that may die during one baseline before it fails."""
_LOST = "The worker stopped {tries} times before it had measured the model. Lower max_rows, or choose a smaller model."


# --- the owner's requests -----------------------------------------------------------------------------------------


def request(
    session: Session,
    project_id: str,
    model: Model,
    eval_file: File,
    examples_file: File | None,
    order: Order,
    *,
    external_key: str | None = None,
) -> Baseline:
    """Creates and queues a baseline. Raises InvalidValue, QuotaExceeded."""
    files.check_trainable(eval_file, param="eval_file")
    if examples_file is not None:
        files.check_trainable(examples_file, param="examples_file")
    elif order.shows_examples:
        reason = (
            "Examples come from a file: set 'examples_file', for instance to the training file, or set shots to [0]."
        )
        raise InvalidValue(param="examples_file", reason=reason)
    live = select(func.count()).where(Baseline.project_id == project_id, Baseline.status.in_(LIVE))
    if (session.scalar(live) or 0) >= MOST_LIVE:
        raise QuotaExceeded(what=f"The project has {MOST_LIVE} unfinished baselines, its limit.")
    baseline = Baseline(
        id=ids.new(ids.BASELINE),
        project_id=project_id,
        model=model.id,
        eval_file=eval_file.id,
        examples_file=examples_file.id if examples_file else None,
        order=order.model_dump(mode="json"),
        external_key=external_key,
    )
    session.add(baseline)
    session.flush()
    dispatch.nudge_after_commit(session, dispatch.IO)
    return baseline


def find(session: Session, project_id: str, baseline_id: str, *, param: str | None = None) -> Baseline:
    """Returns a project's own baseline. Raises NotFound."""
    found = session.scalar(select(Baseline).where(Baseline.project_id == project_id, Baseline.id == baseline_id))
    if found is None:
        raise NotFound(param=param, kind="baseline", id=baseline_id)
    return found


def find_measured(session: Session, project_id: str, baseline_id: str, *, param: str | None = None) -> Baseline:
    """Returns a project's own baseline that has succeeded. Raises NotFound, WrongState."""
    found = find(session, project_id, baseline_id, param=param)
    if found.status != SUCCEEDED:
        instead = "Wait until its status is 'succeeded'." if found.status in LIVE else "Create another baseline."
        raise WrongState(
            param=param, kind="Baseline", id=baseline_id, state=found.status, action="read", instead=instead
        )
    return found


def list_page(session: Session, project_id: str, *, after: str | None, limit: int) -> tuple[list[Baseline], bool]:
    """Returns one page, newest first, and whether more follow. Raises NotFound."""
    owned = select(Baseline).where(Baseline.project_id == project_id)
    by = (Baseline.created_at, Baseline.id)
    return page(session, owned, by=by, id=Baseline.id, kind="baseline", after=after, limit=limit)


def cancel(session: Session, project_id: str, baseline_id: str) -> Baseline:
    """Cancels an unfinished baseline; its worker stops within a second. Raises NotFound, WrongState."""
    baseline = find(session, project_id, baseline_id)
    session.refresh(baseline, with_for_update=True)
    if baseline.status not in LIVE:
        instead = "Its results are kept." if baseline.status == SUCCEEDED else "There is nothing to cancel."
        raise WrongState(kind="Baseline", id=baseline_id, state=baseline.status, action="cancelled", instead=instead)
    _end(session, baseline, CANCELLED)
    return baseline


def cancel_all(session: Session, project_id: str) -> None:
    """Cancels all unfinished baselines of a project."""
    live = select(Baseline).where(Baseline.project_id == project_id, Baseline.status.in_(LIVE)).with_for_update()
    for baseline in session.scalars(live).all():
        _end(session, baseline, CANCELLED)


def live_user_of(session: Session, file_id: str) -> str | None:
    """Returns the id of a job or a baseline that has not ended and reads the file."""
    reads = (Baseline.eval_file == file_id) | (Baseline.examples_file == file_id)
    found = session.scalar(select(Baseline.id).where(Baseline.status.in_(LIVE), reads).limit(1))
    return found or jobs.live_job_using(session, file_id)


# --- the worker's turns -------------------------------------------------------------------------------------------


def waiting(session: Session) -> list[str]:
    """Returns the ids of the baselines to measure, the oldest first: also those whose worker has ended meanwhile."""
    query = select(Baseline.id).where(Baseline.status.in_(LIVE))
    return list(session.scalars(query.order_by(Baseline.created_at)))


def begin(session: Session, baseline_id: str) -> Baseline | None:
    """Returns the baseline, now running; None if it is no longer wanted or too many workers have died during it."""
    baseline = session.get(Baseline, baseline_id, with_for_update=True)
    if baseline is None or baseline.status not in LIVE:
        return None
    if baseline.tries >= MAX_TRIES:
        _end(session, baseline, FAILED, error=_LOST.format(tries=baseline.tries))
        return None
    baseline.status, baseline.progress = RUNNING, 0.0
    baseline.tries += 1
    session.flush()
    return baseline


def release(session: Session, baseline_id: str) -> None:
    """Requeues a baseline that an outage or a shutdown interrupted, without counting a try."""
    query = update(Baseline).where(_is_running(baseline_id))
    session.execute(query.values(status=QUEUED, tries=Baseline.tries - 1))


def show_progress(session: Session, baseline_id: str, fraction: float) -> bool:
    """Stores the progress, 0 to 1; returns whether the baseline is still wanted."""
    query = update(Baseline).where(_is_running(baseline_id)).values(progress=fraction).returning(Baseline.id)
    return session.scalar(query) is not None


def finish(
    session: Session, baseline_id: str, *, result: dict[str, Any] | None = None, error: str | None = None
) -> bool:
    """Stores a baseline's result or its error. Returns False if it is no longer wanted."""
    baseline = session.get(Baseline, baseline_id, with_for_update=True)
    if baseline is None or baseline.status != RUNNING:
        return False
    _end(session, baseline, SUCCEEDED if error is None else FAILED, result=result, error=error)
    return True


def _is_running(baseline_id: str) -> ColumnElement[bool]:
    return (Baseline.id == baseline_id) & (Baseline.status == RUNNING)


def _end(
    session: Session, baseline: Baseline, status: str, *, result: dict[str, Any] | None = None, error: str | None = None
) -> None:
    baseline.status, baseline.result, baseline.error = status, result, error
    baseline.external_key = None
    baseline.progress = 1.0 if status == SUCCEEDED else baseline.progress
    baseline.finished_at = func.clock_timestamp()
    session.flush()
    dispatch.nudge_after_commit(session, dispatch.IO)
    session.refresh(baseline)


def compared(order: Order, found: Sequence[Model]) -> Order:
    """Returns the order with the ids of other models, each once."""
    return order.model_copy(update={"compare": list(dict.fromkeys(model.id for model in found))})
