"""Manifests: the list of a folder's files with sizes and sha256. A folder in storage exists once its manifest does."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tunery import digests
from tunery.storage import Check, Storage, check_key
from tunery.storage.errors import ChecksumMismatch

NAME = "manifest.json"
"""The manifest's own name. It does not list itself: its sha256 is kept in the database."""


def _relative(path: str) -> str:
    # A manifest comes from storage, which others may write to: `../../etc/cron.d/x` must not leave the folder.
    return check_key(path)


class ManifestFile(BaseModel):
    """One file: `path` relative to the folder, with `/` between parts; `bytes` its size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, AfterValidator(_relative)]
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """All files of a folder, sorted by path. Two folders with equal content have equal manifests, byte for byte."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    files: tuple[ManifestFile, ...]

    @property
    def texts(self) -> "Manifest":
        """Returns the manifest without the weights: tokenizer, chat template and configs of a model."""
        return Manifest(files=tuple(file for file in self.files if not file.path.endswith(".safetensors")))

    def encode(self) -> bytes:
        """Returns the canonical JSON, which is stored as manifest.json and of which `sha256` is the digest."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def describe(folder: Path) -> Manifest:
    """Returns a folder's manifest, without hidden files and a top-level manifest.json. Reads every byte."""
    files = (
        ManifestFile(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=digests.sha256(path))
        for path in _files(folder)
    )
    return Manifest(files=tuple(sorted(files, key=lambda file: file.path)))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path != folder / NAME:
            yield path


def publish(storage: Storage, prefix: str, folder: Path) -> tuple[Manifest, str]:
    """Stores a folder under `prefix`; returns its manifest and the manifest's sha256.

    The manifest is written last, so the files of a publisher that dies have no manifest and are not read. It is never
    overwritten: of two publishers under one prefix the second gets `KeyTaken`. Sizes and digests are those of the bytes
    that were sent, so a file changed meanwhile cannot make the manifest wrong.
    """
    stored = (
        (path, storage.put_file(f"{prefix}/{path.relative_to(folder).as_posix()}", path)) for path in _files(folder)
    )
    files = [
        ManifestFile(path=path.relative_to(folder).as_posix(), bytes=done.bytes, sha256=done.sha256)
        for path, done in stored
    ]
    manifest = Manifest(files=tuple(sorted(files, key=lambda file: file.path)))
    storage.put(f"{prefix}/{NAME}", manifest.encode(), if_absent=True)
    return manifest, manifest.sha256


def load(storage: Storage, prefix: str, sha256: str) -> Manifest:
    """Returns the stored manifest. Raises ObjectMissing, and ChecksumMismatch if it is not the recorded one."""
    key = f"{prefix}/{NAME}"
    text = b"".join(storage.read(key))
    found = hashlib.sha256(text).hexdigest()
    if found != sha256:
        raise ChecksumMismatch(key=key, expected=sha256, found=found)
    return Manifest.model_validate_json(text)


def remove(storage: Storage, prefix: str) -> None:
    """Deletes a folder's objects, the manifest first, so that a partial folder is never taken for a whole one."""
    storage.delete(f"{prefix}/{NAME}")
    for key in list(storage.list(f"{prefix}/")):
        storage.delete(key)


def fetch(storage: Storage, prefix: str, manifest: Manifest, folder: Path, check: Check = lambda: None) -> None:
    """Downloads every file into `folder`, the manifest last. Raises ObjectMissing, ChecksumMismatch and what `check`
    raises.

    Files with the right bytes are kept, so an interrupted download resumes where it stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        check()
        _fetch_file(storage, prefix, file, folder / file.path, check)
    partial = folder / f".{NAME}.partial"
    partial.write_bytes(manifest.encode())
    partial.replace(folder / NAME)


def _fetch_file(storage: Storage, prefix: str, file: ManifestFile, path: Path, check: Check) -> None:
    if path.is_file() and path.stat().st_size == file.bytes and digests.sha256(path) == file.sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.fetch(f"{prefix}/{file.path}", path, file.sha256, check)
