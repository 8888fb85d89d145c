"""Every list that has a cursor continues in the same way."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import rows
from sqlalchemy import func
from sqlalchemy.orm import Session

from tunery.datasets import files
from tunery.errors import NotFound
from tunery.jobs import ledger, queries
from tunery.keys.model import Project
from tunery.paging import Row
from tunery.webhooks import endpoints
from tunery.webhooks.messages import EVENT_TYPES


@pytest.fixture
def owner(session: Session) -> Project:
    return rows.project(session)


def _file(session: Session, owner: Project) -> str:
    return rows.file(session, owner).id


def _endpoint(session: Session, owner: Project) -> str:
    address = {"url": "https://8.8.8.8/", "allow": []}
    return endpoints.create(session, owner.id, name="hook", event_types=EVENT_TYPES[:1], **address).id


def _labelled_job(session: Session, owner: Project) -> str:
    return rows.job(session, owner, user_metadata={"label": "yes"}).id


def _delete_file(session: Session, owner: Project, id: str) -> None:
    files.delete(session, files.find(session, owner.id, id), in_use_by=None)


def _expire_file(session: Session, owner: Project, id: str) -> None:
    files.find(session, owner.id, id).expires_at = func.clock_timestamp() - timedelta(seconds=1)
    session.flush()


def _delete_endpoint(session: Session, owner: Project, id: str) -> None:
    endpoints.delete(session, owner.id, id)


def _take_label(session: Session, owner: Project, id: str) -> None:
    ledger.find(session, owner.id, id).user_metadata = {}
    session.flush()


def _list_files(session: Session, owner: Project, after: str | None) -> tuple[list[Row], bool]:
    return files.list_page(session, owner.id, after=after, limit=2)


def _list_endpoints(session: Session, owner: Project, after: str | None) -> tuple[list[Row], bool]:
    return endpoints.list_page(session, owner.id, after=after, limit=2)


def _list_labelled(session: Session, owner: Project, after: str | None) -> tuple[list[Row], bool]:
    return queries.list_jobs(session, owner.id, metadata=[("label", "yes")], after=after, limit=2)


@pytest.mark.parametrize(
    ("create", "hide", "list_page"),
    [
        pytest.param(_file, _delete_file, _list_files, id="deleted file"),
        pytest.param(_file, _expire_file, _list_files, id="expired file"),
        pytest.param(_endpoint, _delete_endpoint, _list_endpoints, id="deleted endpoint"),
        pytest.param(_labelled_job, _take_label, _list_labelled, id="job without its label"),
    ],
)
def test_a_cursor_keeps_its_place_when_its_row_is_no_longer_listed(
    session: Session, owner: Project, create: Callable[..., str], hide: Callable[..., None], list_page: Callable
) -> None:
    made = [create(session, owner) for _ in range(5)]
    page, more = list_page(session, owner, None)
    assert ([row.id for row in page], more) == ([made[4], made[3]], True)
    hide(session, owner, made[3])

    page, more = list_page(session, owner, made[3])
    assert ([row.id for row in page], more) == ([made[2], made[1]], True)
    page, more = list_page(session, owner, made[1])
    assert ([row.id for row in page], more) == ([made[0]], False)


@pytest.mark.parametrize(
    ("create", "list_page"), [(_file, _list_files), (_endpoint, _list_endpoints), (_labelled_job, _list_labelled)]
)
def test_a_cursor_of_another_project_is_refused(
    session: Session, owner: Project, create: Callable[..., str], list_page: Callable
) -> None:
    foreign = create(session, rows.project(session))
    with pytest.raises(NotFound) as refused:
        list_page(session, owner, foreign)
    assert refused.value.param == "after"
