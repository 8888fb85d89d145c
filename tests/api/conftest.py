"""The application on a database of its own, and clients of it: plain and the official one, in process."""

from collections.abc import Callable

import pytest
import rows
from databases import Database
from fastapi import FastAPI
from fastapi.testclient import TestClient
from teams import ALIAS, BASE, SOURCE, Team

from api.main import create_app
from tunery.keys import ring
from tunery.models import registry


@pytest.fixture
def app(database: Database) -> FastAPI:
    return create_app(database.settings)


@pytest.fixture
def anonymous(app: FastAPI) -> TestClient:
    """A client without a key."""
    return TestClient(app)


@pytest.fixture
def make_team(app: FastAPI, database: Database) -> Callable[..., Team]:
    def make(name: str, *, admin: bool = False, **caps: int) -> Team:
        with database.sessions.begin() as session:
            project = ring.create_project(session, name, **caps)
            _, secret = ring.create_key(session, project, "test", admin=admin)
        return Team(project.id, name, secret, TestClient(app, headers={"authorization": f"Bearer {secret}"}))

    return make


@pytest.fixture
def team(make_team: Callable[..., Team]) -> Team:
    return make_team("alpha")


@pytest.fixture
def base(database: Database) -> str:
    """A ready base with an alias and a hub id."""
    with database.sessions.begin() as session:
        row = rows.base(session, BASE, source=SOURCE)
        registry.add_alias(session, ALIAS, row)
    return BASE
