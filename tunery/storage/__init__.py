"""Objects by key, in a directory or in an S3 bucket, behind one protocol and one conformance suite.

Keys are made by the server, never by a user: user names travel as metadata only. All calls block; an
event loop calls them in a thread. Memory stays constant whatever an object's size.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from tunery.settings import Settings
from tunery.storage.bucket import Bucket, disposition
from tunery.storage.directory import Directory
from tunery.storage.protocol import CHUNK, Check, Storage, Stored, Writer, check_key

__all__ = [
    "CHUNK",
    "Bucket",
    "Check",
    "Directory",
    "Storage",
    "Stored",
    "Writer",
    "check_key",
    "disposition",
    "open_storage",
]


def open_storage(settings: Settings) -> Storage:
    """Returns the storage that `settings.storage_url` names: file:///DIR or s3://BUCKET[/PREFIX]. Raises ValueError."""
    url = urlsplit(settings.storage_url)
    if url.scheme == "file" and not url.netloc and url.path.startswith("/"):
        return Directory(Path(unquote(url.path)))
    if url.scheme == "s3" and url.netloc:
        return Bucket(settings, url.netloc, url.path.strip("/"))
    raise ValueError(f"TUNERY_STORAGE_URL is '{settings.storage_url}'; use file:///DIRECTORY or s3://BUCKET/PREFIX.")
