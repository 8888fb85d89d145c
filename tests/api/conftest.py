"""The application on a database of its own, and in-process clients of it: a plain one and the official one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_network
from typing import Any

import pytest
import rows
from asgi import serving
from cloned_databases import Database
from fastapi import FastAPI
from fastapi.testclient import TestClient
from model_server import ModelServer
from teams import ALIAS, BASE, SOURCE, Team

from api.main import create_app
from tunery.jobs.states import State
from tunery.keys import auth, projects
from tunery.keys.model import Project
from tunery.models import registry


@pytest.fixture
def make_app(database: Database) -> Callable[..., FastAPI]:
    """Makes an application with some settings changed."""

    def make(**settings: Any) -> FastAPI:
        return create_app(database.settings.model_copy(update=settings))

    return make


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    """The application. It may send webhooks to this machine, where the tests' receivers listen."""
    return make_app(webhook_allow=(ip_network("127.0.0.1/32"),))


@pytest.fixture
def anonymous(app: FastAPI) -> TestClient:
    """A client without a key."""
    return TestClient(app)


@pytest.fixture
def make_team(app: FastAPI, database: Database) -> Callable[..., Team]:
    def make(name: str, *, admin: bool = False, app: FastAPI = app, **caps: int) -> Team:
        with database.sessions.begin() as session:
            project = projects.create_project(session, name, **caps)
            _, secret = auth.create_key(session, project, "test", admin=admin)
        return Team(project.id, name, secret, TestClient(app, headers={"authorization": f"Bearer {secret}"}))

    return make


@pytest.fixture
def team(make_team: Callable[..., Team]) -> Team:
    return make_team("alpha")


@pytest.fixture
def admin(make_team: Callable[..., Team]) -> Team:
    return make_team("operators", admin=True)


@pytest.fixture
def base(database: Database) -> str:
    """A ready base with an alias and a hub id."""
    with database.sessions.begin() as session:
        row = rows.base(session, BASE, source=SOURCE)
        registry.add_alias(session, ALIAS, row)
    return BASE


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Serves applications on real sockets until the test ends."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(serving(app))


@pytest.fixture
def server() -> ModelServer:
    """A stand-in for the model server, which records the requests that it receives."""
    return ModelServer()


@pytest.fixture
def asking(
    server: ModelServer, serve: Callable[[Any], str], make_app: Callable[..., FastAPI], team: Team, base: str
) -> Team:
    """The team, with its API in front of `server`."""
    return team.on(make_app(server_url=serve(server.app)))


@pytest.fixture
def tuned(team: Team, base: str, database: Database) -> str:
    """The id of a model that one of the team's jobs tuned from `base`."""
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, team.id), base_model=base)
        rows.bring(session, job, State.SUCCEEDED)
        return str(job.tuned_model)


@pytest.fixture
def live(app: FastAPI, serve: Callable[[Any], str]) -> str:
    """The address of the API on a real socket."""
    return serve(app)
