"""A deleted model's objects are removed once nothing refers to them, and not before."""

from collections.abc import Callable

import pytest
import rows
from cloned_databases import Database
from sqlalchemy import func, select

from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.jobs import ledger
from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models import registry
from tunery.models.model import Model
from tunery.retention import models
from tunery.storage import Storage, open_storage
from tunery.storage.errors import ObjectMissing
from tunery.storage.protocol import PRESIGN_SECONDS

Delete = Callable[..., None]


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    return open_storage(request.getfixturevalue("settings" if request.param == "directory" else "s3_settings"))


@pytest.fixture
def delete(database: Database) -> Delete:
    """Deletes a model as a user does. `long_ago`: whether the grace period is over."""

    def delete(model: Model, *, long_ago: bool = True) -> None:
        with database.sessions.begin() as session:
            row = session.get_one(Model, model.id)
            registry.delete(session, row)
            if long_ago:
                row.deleted_at = func.clock_timestamp() - models.GRACE

    return delete


def _tuned(database: Database, storage: Storage) -> tuple[Model, Model, Project]:
    """Makes a base, a model tuned from it, and their project; both models have objects in storage."""
    with database.sessions.begin() as session:
        owner = rows.project(session)
        base = rows.base(session)
        job = rows.job(session, owner, State.SUCCEEDED, base_model=base.id)
        tuned = session.get_one(Model, job.tuned_model)
        for model in (base, tuned):
            stored = storage.put(f"{model.prefix}/weights.safetensors", model.id.encode())
            listed = manifest.Manifest(
                files=(manifest.ManifestFile(path="weights.safetensors", bytes=stored.bytes, sha256=stored.sha256),)
            )
            storage.put(f"{model.prefix}/{manifest.NAME}", listed.encode())
            artifacts.record(session, model, listed)
    return base, tuned, owner


def _has(storage: Storage, model: Model) -> bool:
    return bool(list(storage.list(f"{model.prefix}/")))


def test_a_deleted_models_bytes_go_after_the_grace_and_no_others(
    database: Database, storage: Storage, delete: Delete
) -> None:
    base, tuned, _ = _tuned(database, storage)
    _, other, _ = _tuned(database, storage)
    storage.put(f"{tuned.prefix}-half/weights.safetensors", b"its name begins alike")
    delete(tuned, long_ago=False)
    assert models.reclaim(storage) == 0, "a presigned link still works"
    assert models.GRACE.total_seconds() > PRESIGN_SECONDS
    delete(tuned)
    assert models.reclaim(storage) == 1
    assert models.reclaim(storage) == 0
    assert [_has(storage, model) for model in (base, tuned, other)] == [True, False, True]
    assert storage.stat(f"{tuned.prefix}-half/weights.safetensors")
    with database.sessions.begin() as session:
        assert session.get_one(Model, tuned.id).purged_at
        assert not artifacts.list_for(session, tuned.id)
        assert artifacts.list_for(session, other.id)
    with pytest.raises(ObjectMissing):
        storage.read(f"{tuned.prefix}/weights.safetensors")


def test_a_base_stays_for_as_long_as_what_was_tuned_from_it(
    database: Database, storage: Storage, delete: Delete
) -> None:
    base, tuned, _ = _tuned(database, storage)
    delete(base)
    assert models.reclaim(storage) == 0
    assert _has(storage, base)
    delete(tuned)
    assert [models.reclaim(storage) for _ in range(3)] == [1, 1, 0]
    assert not list(storage.list(""))


@pytest.mark.parametrize("state", [State.VALIDATING, State.QUEUED, State.RUNNING, State.PAUSED])
def test_a_model_that_a_live_job_trains_on_stays(
    database: Database, storage: Storage, delete: Delete, state: State
) -> None:
    base, tuned, owner = _tuned(database, storage)
    with database.sessions.begin() as session:
        job = rows.job(session, owner, state, base_model=base.id, parent_model=tuned.id)
    delete(tuned)
    delete(base)
    assert models.reclaim(storage) == 0
    with database.sessions.begin() as session:
        ledger.cancel(session, owner.id, job.id)
    assert [models.reclaim(storage) for _ in range(3)] == [1, 1, 0]


def test_a_base_registered_again_while_its_old_bytes_go_is_reclaimed_once_more(
    database: Database, storage: Storage, delete: Delete
) -> None:
    with database.sessions.begin() as session:
        base = registry.register_base(session, name="again", source="/nowhere")
    storage.put(f"{base.prefix}/half", b"x")
    delete(base)
    assert models.reclaim(storage) == 1
    with database.sessions.begin() as session:
        again = registry.register_base(session, name="again", source="/nowhere")
    storage.put(f"{again.prefix}/half", b"x")
    assert models.reclaim(storage) == 0
    delete(again, long_ago=False)
    with database.sessions.begin() as session:
        row = session.get_one(Model, "again")
        row.purged_at = row.deleted_at - 3 * models.GRACE
        row.deleted_at -= 2 * models.GRACE
    assert models.reclaim(storage) == 1
    assert not list(storage.list(""))
    with database.sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0
