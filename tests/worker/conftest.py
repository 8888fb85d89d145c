"""Fixtures of the worker's tests; see tests/fixtures/workshop.py."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import rows
import tiny_models
from cloned_databases import Database
from fastapi.testclient import TestClient
from workshop import MODEL_INFO, QUICK, Workshop, training_rows

from api.main import create_app
from tunery.jobs.leases import Lease
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.settings import Settings
from tunery.storage import open_storage
from worker.io import validation


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tiny random model's folder, as a conversion leaves it."""
    folder = tiny_models.llama(tmp_path_factory.mktemp("tiny") / "base")
    (folder / "facts.json").write_text(json.dumps(MODEL_INFO))
    return folder


@pytest.fixture
def workshop(
    database: Database, settings: Settings, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workshop]:
    """Yields a workshop without running workers, and without a broker unless the test also asks for `valkey`."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    shop = Workshop(database, open_storage(settings), settings, tmp_path)
    shop.furnish(tiny_base)
    yield shop
    shop.stop()
    shop.until(lambda: not shop.trainers(), "no trainer is left", seconds=10)


@pytest.fixture
def lease(workshop: Workshop) -> Lease:
    """Returns the lease of a validated job that this process has claimed."""
    workshop.submit(workshop.file(training_rows(12)))
    assert validation.validate_next(workshop.settings, workshop.storage)
    with workshop.session() as session:
        claimed = rows.claim(session)
    assert claimed is not None
    return claimed


@pytest.fixture
def client(workshop: Workshop) -> TestClient:
    """Returns a client of the API on the workshop's database, with a key of its project."""
    with workshop.session() as session:
        _, secret = auth.create_key(session, session.get_one(Project, workshop.project_id), "test")
    return TestClient(create_app(workshop.database.settings), headers={"authorization": f"Bearer {secret}"})
