"""The chat template of a stored model, for those who hold no models on their disk."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tunery.artifacts import manifest
from tunery.rows.template import ChatTemplate
from tunery.storage import Storage


@lru_cache(maxsize=2)
def load(storage: Storage, prefix: str, sha256: str) -> ChatTemplate:
    """The template of the model in the folder `prefix`, whose manifest has this `sha256`. The last ones are kept.

    Raises ObjectMissing, ChecksumMismatch, StorageFailed, and CannotRender where the model has none.
    """
    listed = manifest.load(storage, prefix, sha256)
    with TemporaryDirectory(prefix="tunery-") as folder:
        manifest.fetch(storage, prefix, listed.texts, Path(folder))
        return ChatTemplate.load(folder)
