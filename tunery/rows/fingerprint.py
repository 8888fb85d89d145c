"""Computes the digest under which findings about a file's rows are cached, from everything that affects them."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from tunery import rows
from tunery.rows.bulk import Reading
from tunery.rows.readers import FORMATS

_LIBRARIES = ("jinja2", "pydantic-core", "pyarrow", "tokenizers", "tiktoken")


def of_rows(sha256: str, reading: Reading, code: ModuleType, *more: object) -> str | None:
    """Returns the digest for a file with this sha256, read by `code` and this package; None if a plug-in's code or the
    clock affects the result too. `more`: further inputs."""
    encoder, template = reading.encoder, reading.template
    decisive = [
        _describe(encoder.parse),
        _describe(encoder.encode),
        template.fingerprint() if template is not None else "no template",
        *(_describe(each.open) for each in FORMATS.values()),
    ]
    if None in decisive:
        return None
    parts = [sha256, *decisive, sorted(encoder.columns.items()), reading.role, reading.max_length, _code(code), *more]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _describe(function: Callable[..., Any]) -> str | None:
    """Returns a function's name with its bound arguments; None if it is not from this package."""
    if isinstance(function, partial):
        inner = [_describe(each) if callable(each) else repr(each) for each in (function.func, *function.args)]
        return None if None in inner else f"{inner} {sorted(function.keywords.items())}"
    module = getattr(function, "__module__", "")
    return f"{module}.{function.__qualname__}" if module.startswith(f"{rows.__name__}.") else None


@lru_cache(8)
def _code(module: ModuleType) -> str:
    """Returns the digest of the code that reads rows, so that another release reads them again."""
    digest = hashlib.sha256()
    for path in sorted([*Path(rows.__path__[0]).glob("*.py"), Path(str(module.__file__))]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}".encode())
    return digest.hexdigest()
