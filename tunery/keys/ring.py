"""Making, finding and revoking keys and projects.

A key is `tnr_<32 random bytes>_<checksum>`. It is stored as a plain SHA-256: slow hashes protect guessable secrets, and
256 random bits cannot be guessed (docs/decisions/0003). The checksum lets a scanner tell a leaked key from noise.
"""

import base64
import hashlib
import secrets
import zlib
from dataclasses import dataclass

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tunery import ids
from tunery.errors import InvalidValue, NotFound
from tunery.keys.errors import Unauthenticated
from tunery.keys.model import Key, Project

PREFIX = "tnr_"
_SHOWN = 10


@dataclass(frozen=True)
class Caller:
    """Who a request comes from. Every query of a request is narrowed to `project_id`."""

    key_id: str
    project_id: str
    project_name: str
    admin: bool


def _checksum(body: str) -> str:
    return base64.b32encode(zlib.crc32(body.encode()).to_bytes(4, "big")).decode().rstrip("=").lower()


def new_secret() -> str:
    """A fresh key's text, shown once."""
    body = secrets.token_urlsafe(32).replace("_", "-")
    return f"{PREFIX}{body}_{_checksum(body)}"


def is_well_formed(secret: str) -> bool:
    """Whether the text has a key's shape and checksum; says nothing about its being known."""
    body, _, checksum = secret.removeprefix(PREFIX).rpartition("_")
    return secret.startswith(PREFIX) and bool(body) and checksum == _checksum(body)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def create_project(session: Session, name: str, **caps: int | None) -> Project:
    """`caps`: its columns of that kind. Raises InvalidValue when a live project has the name."""
    if session.scalar(select(Project).where(Project.name == name, Project.revoked_at.is_(None))):
        raise InvalidValue(param="name", reason=f"A project named '{name}' exists. Choose another name.")
    project = Project(id=ids.new(ids.PROJECT), name=name, **caps)
    session.add(project)
    session.flush()
    return project


def find_project(session: Session, name_or_id: str) -> Project:
    """A live project by name or id. Raises NotFound."""
    project = session.scalar(
        select(Project).where((Project.name == name_or_id) | (Project.id == name_or_id), Project.revoked_at.is_(None))
    )
    if project is None:
        raise NotFound(kind="project", id=name_or_id)
    return project


def list_projects(session: Session) -> list[Project]:
    return list(session.scalars(select(Project).order_by(Project.created_at)))


def set_rates(session: Session, project: Project, *, requests: int | None, tokens: int | None) -> None:
    """Sets what the project may ask of models a minute; None: what the settings allow every project."""
    project.requests_per_minute, project.tokens_per_minute = requests, tokens
    session.flush()


def revoke_project(session: Session, project: Project) -> None:
    """Closes the project to every key at once. Its objects stay."""
    project.revoked_at = func.now()
    session.flush()


def create_key(session: Session, project: Project, name: str, *, admin: bool = False) -> tuple[Key, str]:
    """The stored row and the key's text; the text cannot be had again."""
    secret = new_secret()
    key = Key(
        id=ids.new(ids.KEY),
        project_id=project.id,
        name=name,
        prefix=secret[:_SHOWN],
        sha256=_digest(secret),
        admin=admin,
    )
    session.add(key)
    session.flush()
    return key, secret


def list_keys(session: Session, project: Project) -> list[Key]:
    return list(session.scalars(select(Key).where(Key.project_id == project.id).order_by(Key.created_at)))


def revoke_key(session: Session, key_id: str) -> Key:
    """Takes effect with the next request. Raises NotFound."""
    key = session.get(Key, key_id)
    if key is None:
        raise NotFound(kind="key", id=key_id)
    key.revoked_at = key.revoked_at or func.now()
    session.flush()
    return key


def authenticate(session: Session, secret: str | None) -> Caller:
    """The caller behind a key's text. Raises Unauthenticated.

    The digest is looked up, not compared in a loop: equal digests need the key itself, so timing tells nothing.
    """
    if not secret:
        raise Unauthenticated(reason="No API key was sent.")
    if not is_well_formed(secret):
        raise Unauthenticated(reason="The API key sent is not one of this server's: its form or checksum is wrong.")
    row = session.execute(
        select(Key, Project).join(Project, Project.id == Key.project_id).where(Key.sha256 == _digest(secret))
    ).one_or_none()
    if row is None or row.Key.revoked_at or row.Project.revoked_at:
        raise Unauthenticated(reason="The API key sent is unknown or was revoked.")
    _note_use(session, row.Key)
    return Caller(row.Key.id, row.Project.id, row.Project.name, row.Key.admin)


def _note_use(session: Session, key: Key) -> None:
    # At most one write a minute a key: a busy key must not make every read a write.
    session.execute(
        update(Key)
        .where(Key.id == key.id)
        .where(Key.last_used_at.is_(None) | (Key.last_used_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 1)))
        .values(last_used_at=func.now())
        .execution_options(synchronize_session=False)
    )
