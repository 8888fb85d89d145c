"""What `tunery jobs create` sends: flags and `--set` merged into one request and checked before an upload."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from tunery import field_errors, plugins
from tunery.cli.client import ApiClient, Refused
from tunery.datasets import rules
from tunery.failures import JobFailure
from tunery.jobs import creation
from tunery.jobs.request import JobRequest
from tunery.rows.encoding import RowEncoder, find_encoder
from tunery.rows.messages import FileRole

Body = dict[str, Any]

FILES: dict[FileRole, str] = {
    "training": "training_file",
    "validation": "validation_file",
    "test": "evaluation.test_file",
    "replay": "replay.source",
}
"""The fields that name files, by the file's role."""
MOST_FETCHED = 64 * 2**20
"""Bytes of a file on the server that is fetched to be compared with the others."""
_EPOCHS = "method.{method}.hyperparameters.n_epochs"
_BATCH = "method.{method}.hyperparameters.batch_size"
FLAGS = {
    "model": "model",
    "train": "training_file",
    "valid": "validation_file",
    "test": "evaluation.test_file",
    "method": "method.type",
    "technique": "technique.type",
    "rank": "technique.r",
    "alpha": "technique.alpha",
    "epochs": _EPOCHS,
    "batch_size": _BATCH,
    "learning_rate": "learning_rate",
    "suffix": "suffix",
    "columns": "columns",
    "seed": "seed",
}
"""The field that each flag sets; `{method}` is the method of the request."""


def build(flags: dict[str, Any], settings: list[str]) -> Body:
    """Returns one request from all given flags and settings. Raises Refused if two of them contradict."""
    return complete(merge(flags, settings), {"technique": "lora", "method": "supervised"})


def complete(body: Body, types: Mapping[str, str]) -> Body:
    """Returns the request with the missing types of its objects taken from `types`."""
    for name, kind in types.items():
        if isinstance(body.get(name), dict):
            body[name].setdefault("type", kind)
    return body


def merge(flags: dict[str, Any], settings: list[str]) -> Body:
    """Merges all given flags and settings into one request. Raises Refused if two of them contradict."""
    body: Body = {}
    origins: dict[str, str] = {}
    set_fields = [(text, *_setting(text)) for text in settings]
    method = flags.get("method") or dict(field[1:] for field in set_fields).get("method.type") or "supervised"
    for name, value in flags.items():
        if value is not None:
            _merge(body, origins, f"--{name.replace('_', '-')}", FLAGS[name].format(method=method), value)
    for text, path, value in set_fields:
        _merge(body, origins, f"--set {text}", path, value)
    return body


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise Refused(
            message=f"--set {text}: write it as name=value, for instance --set packing=true or "
            "--set evaluation.max_rows=50."
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word is a string


def _merge(body: Body, origins: dict[str, str], origin: str, path: str, value: Any) -> None:
    for leaf, single in _leaves(path, value):
        _put(body, origins, origin, leaf, single)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields every value that is not an object with its dotted path. Null counts as absent, except in metadata."""
    if isinstance(value, dict) and value and path != "metadata":
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    elif value is not None:
        yield path, value


def _put(body: Body, origins: dict[str, str], origin: str, path: str, value: Any) -> None:
    *folders, name = path.split(".")
    here, above = body, ""
    for folder in folders:
        above = f"{above}.{folder}".lstrip(".")
        here = here.setdefault(folder, {})
        if not isinstance(here, dict):
            raise _contradiction(origin, origins.get(above, ""), above)
    if name in here and here[name] != value:
        below = next((other for other in origins if other == path or other.startswith(f"{path}.")), path)
        raise _contradiction(origin, origins.get(below, ""), path)
    here[name] = value
    origins.setdefault(path, origin)


def _contradiction(second: str, first: str, path: str) -> Refused:
    return Refused(message=f"{first} and {second} contradict each other about '{path}'. Give only one of them.")


# --- checking -----------------------------------------------------------------------------------------------------


def check(body: Body) -> None:
    """Checks the fields as the API would. Raises Refused, InvalidValue, Unsupported, PluginFailed."""
    plugins.load(plugins.names(), "cli")
    try:
        creation.check_fields(JobRequest.model_validate(_uploaded(body)))
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise field_errors.explain(faults, body, JobRequest) from None


def local_files(body: Body) -> dict[FileRole, Path]:
    """Returns the files that have to be uploaded, by role. Raises Refused for one that is neither here nor an id."""
    found: dict[FileRole, Path] = {}
    for role, name in _named_files(body):
        path = Path(name).expanduser()
        if path.is_file():
            found[role] = path
        elif not name.startswith("file-"):
            raise Refused(
                message=f"There is no file {name}. Give a file of rows, or the id of an uploaded one (file-...)."
            )
    return found


def stored_files(api: ApiClient, body: Body, local: Collection[FileRole]) -> dict[FileRole, dict[str, Any]]:
    """The files that were uploaded before, by role, as the API describes them. Raises Refused for one that cannot be
    used."""
    found: dict[FileRole, dict[str, Any]] = {}
    for role, name in _named_files(body):
        if role in local:
            continue
        found[role] = api.call("GET", f"/files/{quote(name)}")
        if found[role]["purpose"] != "fine-tune" or found[role]["status"] == "error":
            details = found[role].get("status_details")
            reason = details or f"it has the purpose '{found[role]['purpose']}', not 'fine-tune'."
            raise Refused(message=f"The {role} file {name} cannot be used: {reason}")
    return found


@dataclass
class Source:
    """A file to check, local or on the server. `read` returns a new iterator over its bytes."""

    name: str
    read: Callable[[], Iterator[bytes]]


def sources(
    api: ApiClient, local: dict[FileRole, Path], stored: dict[FileRole, dict[str, Any]]
) -> dict[FileRole, Source]:
    """Returns what `check_files` reads: local files, and files on the server if there is another to compare with.

    Large ones on the server are left to the job's own validation, which compares them too.
    """
    found = {role: Source(str(path), partial(_chunks, path)) for role, path in local.items()}
    if len(local) + len(stored) > 1:
        for role, file in stored.items():
            if file["status"] == "processed" and file["bytes"] <= MOST_FETCHED:
                found[role] = Source(file["id"], partial(api.stream, f"/files/{file['id']}/content"))
    return {role: found[role] for role in FILES if role in found}  # the training file first


def check_files(body: Body, found: dict[FileRole, Source]) -> list[str]:
    """Warnings about rows that are in two of the files. Raises Refused for a file that the API would refuse."""
    overlap = rules.Overlap()
    asked = JobRequest.model_validate(_uploaded(body))
    method, _ = creation.check_fields(asked)
    encoders = {role: find_encoder(method, role, asked.columns) for role in found}
    digests = {role: _check_rows(source, role, encoders[role], overlap) for role, source in found.items()}
    repeats = "test" in found and digests["test"] == digests.get("training")
    if repeats and not body.get("allow_test_on_training_file"):
        raise Refused(message=creation.TEST_IS_TRAINING.format(file=found["test"].name))
    return [
        f"{PurePath(source.name).name}: {reason}"
        for role, source in found.items()
        if role != "replay" and (reason := overlap.reason(role))
    ]


def _check_rows(source: Source, role: FileRole, encoder: RowEncoder, overlap: rules.Overlap) -> bytes:
    """Returns the file's sha256, after what needs no model of the checks that the upload and the job make."""
    digest = hashlib.sha256()

    def read() -> Iterator[bytes]:
        for chunk in source.read():
            digest.update(chunk)
            yield chunk

    try:
        rules.check_examples(read(), role=role, encoder=encoder, overlap=overlap)
    except JobFailure as error:
        raise Refused(message=f"{source.name}: {error.fields.get('reason') or error.message}") from error
    return digest.digest()


def upload(body: Body, files: dict[FileRole, Path], send: Callable[[Path], str]) -> list[str]:
    """Sends each file once and replaces its path by its id in the request. Returns the ids."""
    ids: dict[Path, str] = {}
    for role, path in files.items():
        whole = path.resolve()
        if whole not in ids:
            ids[whole] = send(path)
        *folders, name = FILES[role].split(".")
        here = body
        for folder in folders:
            here = here[folder]
        here[name] = ids[whole]
    return list(ids.values())


def _named_files(body: Body) -> Iterator[tuple[FileRole, str]]:
    """Yields the files that a request names, by path or id."""
    for role, field in FILES.items():
        name = _get(body, field)
        if name is not None and not (role == "replay" and name == "self"):
            yield role, str(name)


def _uploaded(body: Body) -> Body:
    """Returns the request as it will be sent: replay's source is `self` or an id, which a path becomes."""
    source = _get(body, FILES["replay"])
    if not isinstance(source, str) or source == "self":
        return body
    return {**body, "replay": {**body["replay"], "source": "file-here"}}


def _get(body: Body, field: str) -> Any:
    here: Any = body
    for step in field.split("."):
        here = here.get(step) if isinstance(here, dict) else None
    return here


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk
