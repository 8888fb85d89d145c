"""Objects by key, in a directory or in an S3 bucket, behind one protocol and one conformance suite.

Keys are made by the server, never by a user: user names travel as metadata only. All calls block; an
event loop calls them in a thread. Memory stays constant whatever an object's size.
"""

import logging
from pathlib import Path

from tunery import setting_errors, urls
from tunery.errors import WrongSettings
from tunery.settings import Settings
from tunery.storage.bucket import Bucket, disposition
from tunery.storage.directory import Directory
from tunery.storage.errors import StorageFailed, StorageRefused
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
    "open_usable_storage",
]

log = logging.getLogger(__name__)


def open_storage(settings: Settings) -> Storage:
    """Returns the storage that `settings.storage_url` names: file:///DIR or s3://BUCKET[/PREFIX].

    Raises WrongSettings if the directory cannot be created or written to.
    """
    place, prefix = urls.split_storage(settings.storage_url)
    if not place.startswith("/"):
        return Bucket(settings, place, prefix)
    with setting_errors.making_folder("storage_url", Path(place)):
        return Directory(Path(place))


def open_usable_storage(settings: Settings) -> Storage:
    """Returns the storage for a worker that starts. Raises WrongSettings if it refuses what workers do.

    One that does not answer now is only warned of: it may start after the worker.
    """
    storage = open_storage(settings)
    try:
        storage.check()
    except StorageRefused as error:
        raise WrongSettings(lines=error.message) from error
    except StorageFailed as error:
        log.warning("%s", error.message)
    return storage
