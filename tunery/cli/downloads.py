"""Fetching what jobs made and what bases are made of."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from tunery import digests
from tunery.cli.client import ApiClient, Refused
from tunery.planning import engines


def fetch(api: ApiClient, owner: str, files: list[dict[str, Any]], folder: Path) -> Iterator[tuple[str, int]]:
    """Each of `files`, the artifacts of the route `owner`, verified and in `folder`, as (path, bytes).

    Files that are there already are kept. Raises ChecksumMismatch; the wrong bytes are not kept.
    """
    for file in files:
        relative = PurePosixPath(file["path"])
        if relative.is_absolute() or ".." in relative.parts:
            raise Refused(message=f"The server listed a file outside the folder: {file['path']}")
        target = folder / relative
        if not _is_there(target, file):
            _fetch(api, f"{owner}/artifacts/{quote(file['path'])}", target, file)
        yield file["path"], file["bytes"]


def _is_there(target: Path, file: dict[str, Any]) -> bool:
    return target.is_file() and target.stat().st_size == file["bytes"] and digests.sha256(target) == file["sha256"]


def _fetch(api: ApiClient, route: str, target: Path, file: dict[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.part")
    digest = hashlib.sha256()
    with unfinished.open("wb") as out:
        for chunk in api.stream(route):
            out.write(chunk)
            digest.update(chunk)
    if (found := digest.hexdigest()) != file["sha256"]:
        # Here, as storage brings boto3, which would make every command start slowly.
        from tunery.storage.errors import ChecksumMismatch

        unfinished.unlink()
        raise ChecksumMismatch(key=file["path"], expected=file["sha256"], found=found)
    unfinished.rename(target)


def model_route(model: str) -> str:
    return f"/models/{quote(model, safe=':')}"


def model_files(api: ApiClient, model: str) -> list[dict[str, Any]]:
    """Returns a model's files. Raises Refused where it has none, as one that is being converted."""
    files: list[dict[str, Any]] = api.call("GET", f"{model_route(model)}/artifacts")["data"]
    if not files:
        status = api.call("GET", model_route(model))["status"]
        raise Refused(message=f"{model} has no files to download: it is {status}. `tunery models show {model}`")
    return files


def is_adapter(folder: Path) -> bool:
    return (folder / engines.ADAPTER).is_file()


def point_at_base(folder: Path, base: Path) -> Path:
    """Writes where the base lies into the adapter's configuration, and returns its path.

    PEFT loads an adapter's base from there. Absolute, as PEFT would look for a relative path in the working directory.
    """
    path = folder / engines.ADAPTER
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base.resolve())
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path
