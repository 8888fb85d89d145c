"""Decides whether a job could use a file, as the job's validation would without a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunery.datasets import rules
from tunery.failures import InvalidTrainingFile, JobFailure
from tunery.rows import readers
from tunery.rows.encoding import CHATS_OR_PAIRS, ENCODERS, RowEncoder, encode_any
from tunery.rows.errors import InvalidRows
from tunery.rows.formats import SourceRow
from tunery.rows.messages import Example, FileRole
from tunery.rows.pairs import PairShape

_ANY_LENGTH = 2**20


@dataclass(frozen=True)
class Verdict:
    """`format`: what the bytes are; `shape`: what the rows are. `reason`: why no job can take the file, or None.
    `warnings`: what its owner should know anyway. `are_pairs`: whether the rows are preference pairs, which `dpo` alone
    learns from; None if no job can take the file."""

    format: str
    shape: str | None
    examples: int
    reason: str | None
    warnings: tuple[str, ...] = ()
    are_pairs: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the verdict for JSON."""
        return {**asdict(self), "warnings": list(self.warnings), "trainable": self.reason is None}


def judge(
    read: Callable[[], Iterable[bytes]],
    *,
    role: FileRole = "training",
    least: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Verdict:
    """Returns the verdict on the file whose bytes `read` gives, each time from the start; in constant memory.

    `least`: examples that it must have, by default as many as a file of its role. `columns`: see `FileShape`.
    """
    kind = "unknown"
    try:
        kind = readers.identify(read())
        encoder = replace(ANY_METHOD, columns=columns or {})
        found = rules.check_examples(read(), role=role, encoder=encoder, least=least)
    except InvalidRows as error:
        return Verdict(kind, None, 0, error.message)
    except JobFailure as error:
        return Verdict(kind, None, 0, str(error.fields.get("reason") or error.message))
    described = found.shape.describe()
    # The first warning would say the same.
    warnings = found.warnings(_ANY_LENGTH)[described is not None :]
    are_pairs = isinstance(found.shape.shape, PairShape)
    return Verdict(kind, described or f"{found.shape.name} rows", found.examples, None, tuple(warnings), are_pairs)


def _parse(source: SourceRow, role: FileRole) -> Example:
    """The row as the first method reads it that can. Raises InvalidTrainingFile, with the reason of chats and pairs."""
    try:
        return CHATS_OR_PAIRS.parse(source, role)
    except InvalidTrainingFile:
        for encoder in _added():
            try:
                return encoder.parse(source, role)
            except InvalidTrainingFile:
                continue
        raise


def _added() -> list[RowEncoder]:
    """Returns the encoders of methods that plug-ins have added."""
    return [encoder for name, encoder in ENCODERS.items() if name not in ("supervised", "dpo")]


ANY_METHOD = RowEncoder(_parse, encode_any)
"""Reads rows of any method."""
