"""Dependencies of routes."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session, sessionmaker

from api import query
from tunery.datasets.columns import parse as parse_columns
from tunery.keys import auth
from tunery.keys.auth import Caller
from tunery.keys.errors import Forbidden
from tunery.settings import Settings
from tunery.spec import Columns
from tunery.storage import Storage

_bearer = HTTPBearer(
    auto_error=False, scheme_name="API key", description="A project's key: `tunery keys create` makes one."
)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


def _sessions(request: Request) -> sessionmaker[Session]:
    sessions: sessionmaker[Session] = request.app.state.sessions
    return sessions


After = Annotated[str | None, Query(description="The id of the previous page's last object")]
UpTo100 = Annotated[int, Query(ge=1, le=100, description="Objects per page")]
UpTo1000 = Annotated[int, Query(ge=1, le=1000, description="Objects per page")]
SettingsDep = Annotated[Settings, Depends(_settings)]
StorageDep = Annotated[Storage, Depends(_storage)]
SessionsDep = Annotated[sessionmaker[Session], Depends(_sessions)]


def _session(sessions: SessionsDep) -> Iterator[Session]:
    with sessions.begin() as session:
        yield session


# Why not FastAPI's default scope: there, what follows the `yield` runs after the answer has left, and a commit that
# fails would have been answered with 200. Whatever is built on this must be function-scoped too.
SessionDep = Annotated[Session, Depends(_session, scope="function")]
"""The request's one transaction, committed before its answer leaves and closed before a stream starts."""


def _secret(credentials: Credentials) -> str | None:
    return credentials.credentials if credentials else None


def _caller(request: Request, session: SessionDep, credentials: Credentials) -> Caller:
    caller = auth.authenticate(session, _secret(credentials))
    query.check(request)
    return caller


def _caller_apart(request: Request, sessions: SessionsDep, credentials: Credentials) -> Caller:
    with sessions.begin() as session:
        caller = auth.authenticate(session, _secret(credentials))
    query.check(request)
    return caller


CallerDep = Annotated[Caller, Depends(_caller, scope="function")]
"""The authenticated caller, found in the request's transaction."""
ANY_KEY = Depends(_caller, scope="function")
"""For routes whose answer is the same for every project."""
StreamCallerDep = Annotated[Caller, Depends(_caller_apart)]
"""The caller, found in a separate transaction: for routes that move bytes for minutes and must not hold a database
connection meanwhile."""


def _admin(caller: CallerDep) -> Caller:
    if not caller.admin:
        raise Forbidden(action="change what all projects share")
    return caller


AdminDep = Annotated[Caller, Depends(_admin, scope="function")]
"""A caller with an administrator's key."""


def _columns(
    columns: Annotated[
        str | None, Query(description="The columns of the file, as in a job: prompt=Frage,completion=Antwort")
    ] = None,
) -> Columns | None:
    """Raises InvalidValue where `columns` name no rows."""
    return None if columns is None else parse_columns(columns)


ColumnsDep = Annotated[Columns | None, Depends(_columns)]
"""The columns that a query names, by part."""
