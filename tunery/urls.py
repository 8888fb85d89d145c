"""Checks the URLs of settings when a service starts; otherwise a wrong one would show at its first use, or never."""

import contextlib
from collections.abc import Collection
from urllib.parse import SplitResult, unquote, urlsplit

_DATABASE = "should begin with postgresql+psycopg://, as in postgresql+psycopg://USER:PASSWORD@HOST/NAME"
_PARTS = (
    "should be postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME; in the password, write @ as %40, / as %2F, ? as %3F, "
    "# as %23 and % as %25"
)
_BROKERS = ("redis", "rediss", "redis+socket")
_BROKER = "should be the URL of Redis or Valkey, as in redis://HOST:6379/0, or rediss:// for TLS"
_STORAGE = "should be file:///DIRECTORY with an absolute path, or s3://BUCKET or s3://BUCKET/PREFIX"
_HTTP = "should be the URL of a server, as in http://HOST:8001"


def check_database(url: str) -> str:
    """Returns the URL of a database. Raises ValueError, which says what is expected.

    An @ in a password that is not encoded would make its rest a part of the host, which errors and logs may show.
    """
    from sqlalchemy.engine import make_url  # commands that need no database start without it
    from sqlalchemy.exc import ArgumentError

    if not url.startswith("postgresql+psycopg://"):
        raise ValueError(_DATABASE)
    with contextlib.suppress(ValueError, ArgumentError):
        parts = make_url(url)
        if "@" not in (parts.host or "") and "@" not in (parts.database or ""):
            return url
    raise ValueError(_PARTS)


def check_broker(url: str) -> str:
    """Returns the URL of a broker. Raises ValueError, which says what is expected."""
    if _split(url, _BROKERS) is None:
        raise ValueError(_BROKER)
    return url


def check_http(url: str) -> str:
    """Returns the URL of an HTTP server. Raises ValueError, which says what is expected."""
    split = _split(url, ("http", "https"))
    if split is None or not split.hostname:
        raise ValueError(_HTTP)
    return url


def check_storage(url: str) -> str:
    """Returns the URL of a storage. Raises ValueError, which says what is expected."""
    split_storage(url)
    return url


def split_storage(url: str) -> tuple[str, str]:
    """Returns the directory and nothing, or the bucket and its prefix. Raises ValueError, which says what is expected.

    Only a directory begins with a slash.
    """
    split = _split(url, ("file", "s3"))
    if split is not None and split.scheme == "file" and not split.netloc and split.path.startswith("/"):
        return unquote(split.path), ""
    if split is not None and split.scheme == "s3" and split.netloc:
        return split.netloc, split.path.strip("/")
    raise ValueError(_STORAGE)


def _split(url: str, schemes: Collection[str]) -> SplitResult | None:
    """Returns the parts of a URL with one of the schemes; None for others, and for a port that is no number."""
    with contextlib.suppress(ValueError):
        split = urlsplit(url)
        if split.scheme in schemes and url.startswith(f"{split.scheme}://") and split.port != 0:
            return split
    return None
