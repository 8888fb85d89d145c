"""Checks the URLs of settings when a service starts; otherwise a wrong one would show at its first use, or never."""

import contextlib
from collections.abc import Collection
from urllib.parse import SplitResult, unquote, urlsplit

_BROKERS = ("redis", "rediss", "redis+socket")
_BROKER = "should be the URL of Redis or Valkey, as in redis://HOST:6379/0, or rediss:// for TLS"
_STORAGE = "should be file:///DIRECTORY with an absolute path, or s3://BUCKET or s3://BUCKET/PREFIX"
_HTTP = "should be the URL of a server, as in http://HOST:8001"


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
