"""Creates, lists and revokes keys, and authenticates requests by them.

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
from tunery.errors import NotFound
from tunery.keys.errors import Unauthenticated
from tunery.keys.model import Key, Project

PREFIX = "tnr_"
_SHOWN = 10


@dataclass(frozen=True)
class Caller:
    """The project and key of a request. Every query of a request is narrowed to `project_id`."""

    key_id: str
    project_id: str
    project_name: str
    admin: bool


def _checksum(body: str) -> str:
    return base64.b32encode(zlib.crc32(body.encode()).to_bytes(4, "big")).decode().rstrip("=").lower()


def new_secret() -> str:
    """Returns the text of a new key, which is shown only once."""
    body = secrets.token_urlsafe(32).replace("_", "-")
    return f"{PREFIX}{body}_{_checksum(body)}"


def is_well_formed(secret: str) -> bool:
    """Whether the text has a key's format and checksum; the key may still be unknown or revoked."""
    body, _, checksum = secret.removeprefix(PREFIX).rpartition("_")
    return secret.startswith(PREFIX) and bool(body) and checksum == _checksum(body)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(session: Session, project: Project, name: str, *, admin: bool = False) -> tuple[Key, str]:
    """Creates a key; returns its row and its text, which is not stored."""
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


def find_key(session: Session, key_id: str) -> Key:
    """Returns a key by its id. Raises NotFound."""
    key = session.get(Key, key_id)
    if key is None:
        raise NotFound(kind="key", id=key_id)
    return key


def revoke_key(session: Session, key_id: str) -> Key:
    """Revokes a key from the next request on. Raises NotFound."""
    key = find_key(session, key_id)
    key.revoked_at = key.revoked_at or func.now()
    session.flush()
    return key


def authenticate(session: Session, secret: str | None) -> Caller:
    """Returns the caller that a key's text identifies. Raises Unauthenticated.

    The digest is looked up, not compared in a loop: equal digests need the key itself, so timing reveals nothing.
    """
    if not secret:
        raise Unauthenticated(reason="The request has no API key.")
    if not is_well_formed(secret):
        raise Unauthenticated(reason="The API key does not belong to this server: its form or checksum is wrong.")
    row = session.execute(
        select(Key, Project).join(Project, Project.id == Key.project_id).where(Key.sha256 == _digest(secret))
    ).one_or_none()
    if row is None or row.Key.revoked_at or row.Project.revoked_at:
        raise Unauthenticated(reason="The API key is unknown or has been revoked.")
    _note_use(session, row.Key)
    return Caller(row.Key.id, row.Project.id, row.Project.name, row.Key.admin)


def _note_use(session: Session, key: Key) -> None:
    # At most one write per key and minute, so that reads with a busy key do not all become writes.
    session.execute(
        update(Key)
        .where(Key.id == key.id)
        .where(Key.last_used_at.is_(None) | (Key.last_used_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 1)))
        .values(last_used_at=func.now())
        .execution_options(synchronize_session=False)
    )
