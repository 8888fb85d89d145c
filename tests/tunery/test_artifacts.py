"""Publishing a folder to storage and fetching it back."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunery.artifacts import manifest
from tunery.artifacts.model import list_for, record
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import Storage, open_storage
from tunery.storage.errors import ChecksumMismatch, KeyTaken, ObjectMissing


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    settings: Settings = request.getfixturevalue("settings" if request.param == "directory" else "s3_settings")
    return open_storage(settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(70_000))
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    (folder / "empty.txt").touch()
    (folder / ".lock").write_text("of no interest")
    return folder


def test_a_manifest_lists_what_is_there(folder: Path) -> None:
    found = manifest.describe(folder)

    assert [file.path for file in found.files] == [
        "adapter_model.safetensors",
        "empty.txt",
        "tokenizer/tokenizer.json",
    ]
    assert found.bytes == 70_002
    assert found.files[1].sha256 == hashlib.sha256(b"").hexdigest()
    assert manifest.Manifest.model_validate_json(found.encode()) == found
    assert json.loads(found.encode())["version"] == 1


def test_a_folder_goes_there_and_back(storage: Storage, folder: Path, tmp_path: Path) -> None:
    published, sha256 = manifest.publish(storage, "jobs/a/1", folder)
    manifest.fetch(storage, "jobs/a/1", manifest.load(storage, "jobs/a/1", sha256), tmp_path / "copy")

    assert published == manifest.describe(folder) == manifest.describe(tmp_path / "copy")
    assert hashlib.sha256((tmp_path / "copy/manifest.json").read_bytes()).hexdigest() == sha256 == published.sha256


def test_the_second_publisher_loses(storage: Storage, folder: Path, tmp_path: Path) -> None:
    _, sha256 = manifest.publish(storage, "a", folder)
    with pytest.raises(KeyTaken):
        manifest.publish(storage, "a", folder)

    assert manifest.load(storage, "a", sha256).sha256 == sha256


def test_a_publisher_that_breaks_off_leaves_no_manifest(storage: Storage, folder: Path) -> None:
    (folder / "zz-unreadable").symlink_to(folder / "zz-unreadable")
    (folder / "zz").write_text("x")
    (folder / "zz\n").write_text("a name that storage refuses")
    with pytest.raises(ValueError, match="is not a storage key"):
        manifest.publish(storage, "a", folder)

    assert storage.stat("a/adapter_model.safetensors") == 70_000
    with pytest.raises(ObjectMissing):
        manifest.load(storage, "a", "0" * 64)


def test_a_fetch_goes_on_where_it_was_cut_off(storage: Storage, folder: Path, tmp_path: Path) -> None:
    published, _ = manifest.publish(storage, "a", folder)
    manifest.fetch(storage, "a", published, tmp_path / "copy")
    (tmp_path / "copy/tokenizer/tokenizer.json").write_text("[]")
    storage.delete("a/adapter_model.safetensors")
    manifest.fetch(storage, "a", published, tmp_path / "copy")

    assert manifest.describe(tmp_path / "copy") == published, "kept what was right, replaced what was not"


def test_rot_is_found(storage: Storage, folder: Path, tmp_path: Path) -> None:
    published, sha256 = manifest.publish(storage, "a", folder)
    storage.put("a/tokenizer/tokenizer.json", b"[]")
    with pytest.raises(ChecksumMismatch, match=r"a/tokenizer/tokenizer\.json"):
        manifest.fetch(storage, "a", published, tmp_path / "copy")
    assert not (tmp_path / "copy/manifest.json").exists(), "a folder without its manifest is not taken for whole"

    storage.put("a/manifest.json", published.encode() + b" ")
    with pytest.raises(ChecksumMismatch, match=r"a/manifest\.json"):
        manifest.load(storage, "a", sha256)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", ".hidden", ""])
def test_a_forged_manifest_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="is not a storage key"):
        manifest.ManifestFile(path=path, bytes=1, sha256="0" * 64)


def test_rows_of_a_model(session: Session, folder: Path) -> None:
    model = Model(id="base", kind="base", prefix="models/base", model_info={})
    session.add(model)
    session.flush()
    found = manifest.describe(folder)
    record(session, model, found)

    rows = list_for(session, "base")
    assert [(row.path, row.bytes, row.sha256) for row in rows] == [(f.path, f.bytes, f.sha256) for f in found.files]
    assert rows[2].key == "models/base/tokenizer/tokenizer.json"
    assert list_for(session, "other") == []
    with pytest.raises(IntegrityError):
        record(session, model, found)
