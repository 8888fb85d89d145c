"""Loads the chat template of a model in storage, without its weights."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tunery.artifacts import manifest
from tunery.rows.template import ChatTemplate
from tunery.storage import Storage


@lru_cache(maxsize=2)
def load(storage: Storage, prefix: str, sha256: str) -> ChatTemplate:
    """Returns the template of the model under `prefix`, whose manifest has this `sha256`. The last ones are cached.

    Raises ObjectMissing, ChecksumMismatch, StorageFailed, and CannotRender where the model has none.
    """
    listed = manifest.load(storage, prefix, sha256)
    with TemporaryDirectory(prefix="tunery-") as folder:
        manifest.fetch(storage, prefix, listed.texts, Path(folder))
        return ChatTemplate.load(folder)
