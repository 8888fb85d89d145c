"""Learned tokens for each byte of an answer, by the tokenizer of a stored base."""

from tunery.artifacts import templates
from tunery.datasets import token_rate
from tunery.datasets.model import File
from tunery.models.model import Model
from tunery.rows.errors import CannotRender
from tunery.spec import Columns, named_columns
from tunery.storage import Storage
from tunery.storage.errors import ChecksumMismatch, ObjectMissing


def of_file(storage: Storage, base: Model, file: File, columns: Columns | None) -> float | None:
    """Returns the rate of a file's first rows; None where they, or the base's tokenizer, cannot be read."""
    try:
        # A protocol does not say that its classes can be hashed.
        template = templates.load(storage, base.prefix, base.manifest_sha256 or "")  # type: ignore[arg-type]
        return token_rate.measure(storage.read(file.key), template, named_columns(columns))
    except (CannotRender, ChecksumMismatch, ObjectMissing):
        return None
