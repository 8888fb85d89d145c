"""The log, measurements and files of a job's run. None of these routes is in OpenAI's API."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session, sessionmaker

from api import downloads, scorecard
from api.dependencies import After, CallerDep, SessionDep, SessionsDep, StorageDep, StreamCallerDep, UpTo1000
from api.schemas import runs as schemas
from api.schemas.base import CursorList, ListOf, WholeList, errors
from tunery.artifacts import answers, reproduction
from tunery.artifacts import model as artifacts
from tunery.jobs import ledger, queries
from tunery.jobs.model import Job
from tunery.jobs.states import FINAL
from tunery.models.errors import ModelWithheld
from tunery.storage import Storage

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["Runs"])

POLL_SECONDS = 1.0
"""Between two looks for new text while a log is followed; the workers send theirs every few seconds."""


@router.get(
    "/logs",
    summary="Read a job's log",
    response_class=StreamingResponse,
    responses=errors(404)
    | {200: {"content": {"text/plain": {"example": "loading SmolLM2-135M-Instruct\n"}}, "description": "The log"}},
)
def read_log(
    job_id: str,
    caller: StreamCallerDep,
    sessions: SessionsDep,
    storage: StorageDep,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="Only this many last lines")] = None,
    follow: Annotated[bool, Query(description="Stream until the job has ended")] = False,
) -> StreamingResponse:
    """The trainer's output, of all attempts in order."""
    ended = _has_ended(sessions, caller.project_id, job_id)
    log = _Log(storage, job_id)
    text = log.read(tail)
    all_text = _following(log, text, sessions, caller.project_id) if follow and not ended else text
    return StreamingResponse(all_text, media_type="text/plain; charset=utf-8")


class _Log:
    """A job's log in storage: chunks that are never rewritten, in the order of their keys."""

    def __init__(self, storage: Storage, job_id: str) -> None:
        self.job_id = job_id
        self._storage, self._prefix = storage, f"jobs/{job_id}/logs/"
        self._last = ""

    def read(self, tail: int | None = None) -> Iterator[bytes]:
        """Returns what has been written since the last call; with `tail` only its last lines. Raises StorageFailed.

        Not a generator function: storage is listed before the response starts, so that an error still has its status.
        """
        keys = sorted(key for key in self._storage.list(self._prefix) if key > self._last)
        self._last = keys[-1] if keys else self._last
        if tail is not None:
            return iter([self._end(keys, tail)])
        return (chunk for key in keys for chunk in self._storage.read(key))

    def _end(self, keys: list[str], lines: int) -> bytes:
        """Reads backwards, because logs are long and tails are short."""
        text = b""
        for key in reversed(keys):
            # One line break more than lines: the extra one shows that the first line is complete.
            if text.count(b"\n") > lines:
                break
            text = b"".join(self._storage.read(key)) + text
        return b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b""


async def _following(
    log: _Log, text: Iterator[bytes], sessions: sessionmaker[Session], project_id: str
) -> AsyncIterator[bytes]:
    """Yields `text`, then new text as it is written. Whether the job has ended is checked before each read, so that its
    last output is not missed."""
    ended = False
    while True:
        async for chunk in iterate_in_threadpool(text):
            yield chunk
        if ended:
            return
        await asyncio.sleep(POLL_SECONDS)
        ended = await run_in_threadpool(_has_ended, sessions, project_id, log.job_id)
        text = await run_in_threadpool(log.read)


def _has_ended(sessions: sessionmaker[Session], project_id: str, job_id: str) -> bool:
    with sessions.begin() as session:
        return ledger.find(session, project_id, job_id).state in FINAL


@router.get("/metrics", summary="List a job's measurements", responses=errors(404))
def list_metrics(
    job_id: str,
    session: SessionDep,
    caller: CallerDep,
    after_step: Annotated[int, Query(ge=-1, description="Only later steps")] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Steps per page")] = 1000,
) -> ListOf[schemas.Measured]:
    """Oldest first. Losses are means over labelled tokens, in nats."""
    job = ledger.find(session, caller.project_id, job_id)
    rows, more = queries.list_metrics(session, job, after_step=after_step, limit=limit)
    data = [schemas.Measured(**{**row.values, "step": row.step}) for row in rows]
    return ListOf(data=data, has_more=more)


@router.get(
    "/scorecard.svg",
    summary="Draw a job's scorecard",
    response_class=Response,
    responses=errors(404)
    | {200: {"content": {"image/svg+xml": {"example": "<svg>...</svg>"}}, "description": "The picture"}},
)
def draw_scorecard(job_id: str, session: SessionDep, caller: CallerDep) -> Response:
    """Base and tuned model by each metric, and the change with its interval, as SVG."""
    picture = scorecard.draw(ledger.find(session, caller.project_id, job_id))
    return Response(picture, media_type="image/svg+xml")


@router.get("/scorecard/rows", summary="List a scorecard's rows", responses=errors(404))
def list_scorecard_rows(
    job_id: str,
    session: SessionDep,
    caller: CallerDep,
    storage: StorageDep,
    flipped: Annotated[
        bool | None,
        Query(description="true: rows that exactly one of the models answers correctly; false: the others"),
    ] = None,
    right: Annotated[
        bool | None,
        Query(description="true: rows that the tuned model answers correctly; false: the others"),
    ] = None,
    after: After = None,
    limit: UpTo1000 = 20,
) -> CursorList[schemas.ScorecardRow]:
    """Every test row with both models' answers, in the order of the file. Empty without a scorecard."""
    job = ledger.find(session, caller.project_id, job_id)
    # The rows of a withheld model are returned too: they show why it was withheld.
    files = artifacts.list_for(session, job.tuned_model) if job.tuned_model else ()
    file = next((file for file in files if file.path == answers.FILE), None)
    if file is None:
        return CursorList.of([], has_more=False)
    rows, more = answers.read_page(storage, file, shown=_shows(flipped, right), after=after, limit=limit)
    return CursorList.of([schemas.ScorecardRow.of(row) for row in rows], has_more=more)


def _shows(flipped: bool | None, right: bool | None) -> Callable[[answers.AnsweredRow], bool]:
    def shows(row: answers.AnsweredRow) -> bool:
        was_right, is_right = row.answered["base_right"], row.answered["tuned_right"]
        return flipped in (None, was_right != is_right) and right in (None, is_right)

    return shows


@router.get("/reproduction", summary="Compare a rerun with its original job", responses=errors(404))
def compare_job(
    job_id: str,
    session: SessionDep,
    caller: CallerDep,
    storage: StorageDep,
    tolerance: Annotated[
        float,
        Query(ge=0, le=1, allow_inf_nan=False, description="Largest relative difference of losses at a step"),
    ] = reproduction.TOLERANCE,
) -> schemas.Reproduction:
    """Compares inputs, environment, losses by step, weights and scores."""
    found = reproduction.compare(session, storage, caller.project_id, job_id, tolerance=tolerance)
    return schemas.Reproduction.of(found)


@router.get("/artifacts", summary="List a job's artifacts", responses=errors(404))
def list_artifacts(job_id: str, session: SessionDep, caller: CallerDep) -> WholeList[schemas.Artifact]:
    """The fine-tuned model's files. Empty until the job has succeeded."""
    job = ledger.find(session, caller.project_id, job_id)
    found = _published(session, job)
    return WholeList(data=[schemas.Artifact(path=row.path, bytes=row.bytes, sha256=row.sha256) for row in found])


def _published(session: Session, job: Job) -> Sequence[artifacts.Artifact]:
    """Returns the files of what the job made. Raises ModelWithheld."""
    if job.tuned_model is None:
        return ()
    if job.withholds_model:
        raise ModelWithheld(id=job.tuned_model, job=job.id)
    return artifacts.list_for(session, job.tuned_model)


@router.get(
    "/artifacts/{path:path}",
    summary="Download an artifact",
    response_class=Response,
    responses=errors(404) | downloads.ARTIFACT_ANSWERS,
)
def download_artifact(job_id: str, path: str, session: SessionDep, caller: CallerDep, storage: StorageDep) -> Response:
    """One file. Its sha256 is in the list, and is the ETag if the API itself sends the bytes."""
    job = ledger.find(session, caller.project_id, job_id)
    found = _published(session, job)
    return downloads.artifact(storage, found, path, owner=f"job '{job_id}'")
