"""What both kinds of storage do: one suite, run against a directory and against a real S3 server."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from seaweed import Seaweed

from tunery.settings import Settings
from tunery.storage import CHUNK, Storage, check_key, open_storage, protocol
from tunery.storage.errors import ChecksumMismatch, KeyTaken, ObjectMissing

BIG = 37 * 2**20 + 11
"""Two whole parts of a multipart upload and a remainder."""


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    name = "settings" if request.param == "directory" else "s3_settings"
    settings: Settings = request.getfixturevalue(name)
    return open_storage(settings)


def _content(size: int) -> bytes:
    pattern = hashlib.shake_128(b"tunery").digest(2**20 + 3)  # no period that divides a chunk or a part
    return (pattern * (size // len(pattern) + 1))[:size]


def _read(storage: Storage, key: str, start: int = 0) -> bytes:
    return b"".join(storage.read(key, start))


def test_a_check_of_usable_storage_leaves_nothing(storage: Storage) -> None:
    storage.check()
    assert list(storage.list("")) == []


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, BIG])
def test_what_is_written_is_read(storage: Storage, size: int) -> None:
    data = _content(size)
    with storage.writer("jobs/a/model.safetensors", "application/octet-stream") as writer:
        for at in range(0, size, 3_000_017):
            writer.write(data[at : at + 3_000_017])

    assert writer.stored.key == "jobs/a/model.safetensors"
    assert (writer.stored.bytes, writer.stored.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert storage.stat("jobs/a/model.safetensors") == size
    assert _read(storage, "jobs/a/model.safetensors") == data


def test_a_writer_tells_nothing_before_its_end(storage: Storage) -> None:
    with storage.writer("a") as writer:
        writer.write(b"x")
        with pytest.raises(RuntimeError, match="until its `with` block has ended"):
            _ = writer.stored
        assert storage.stat("a") is None


def _break_off(storage: Storage, key: str, data: bytes) -> None:
    with storage.writer(key) as writer:
        writer.write(data)
        raise InterruptedError("the client went away")


@pytest.mark.parametrize("size", [10, BIG])
def test_a_writer_that_fails_leaves_nothing(storage: Storage, size: int) -> None:
    with pytest.raises(InterruptedError):
        _break_off(storage, "a/b", _content(size))

    assert storage.stat("a/b") is None
    assert list(storage.list("")) == []
    assert storage.sweep(older_than_seconds=-60) == 0, "half an object was left to the sweeper"


def test_a_writer_that_fails_leaves_the_older_object(storage: Storage) -> None:
    storage.put("a", b"older")
    with pytest.raises(InterruptedError):
        _break_off(storage, "a", b"newer")

    assert _read(storage, "a") == b"older"


def test_a_put_replaces(storage: Storage) -> None:
    first = storage.put("a", b"first")
    second = storage.put("a", b"second")

    assert first.sha256 != second.sha256
    assert _read(storage, "a") == b"second"


def test_one_of_many_conditional_puts_wins(storage: Storage) -> None:
    won, lost = [], []
    together = threading.Barrier(8)

    def put(number: int) -> None:
        together.wait()
        try:
            won.append(storage.put("manifest.json", b"%d" % number, if_absent=True))
        except KeyTaken:
            lost.append(number)

    threads = [threading.Thread(target=put, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(won), len(lost)) == (1, 7)
    assert hashlib.sha256(_read(storage, "manifest.json")).hexdigest() == won[0].sha256


def test_a_conditional_put_names_the_key(storage: Storage) -> None:
    storage.put("jobs/a/manifest.json", b"1", if_absent=True)
    with pytest.raises(KeyTaken, match=r"'jobs/a/manifest\.json' already exists in storage"):
        storage.put("jobs/a/manifest.json", b"2", if_absent=True)

    assert _read(storage, "jobs/a/manifest.json") == b"1"


@pytest.mark.parametrize(("start", "expected"), [(0, b"0123456789"), (4, b"456789"), (9, b"9"), (10, b""), (99, b"")])
def test_reading_from_the_middle(storage: Storage, start: int, expected: bytes) -> None:
    storage.put("a", b"0123456789")
    assert _read(storage, "a", start) == expected


def test_a_missing_object(storage: Storage, tmp_path: Path) -> None:
    assert storage.stat("nothing") is None
    storage.delete("nothing")
    with pytest.raises(ObjectMissing, match="'nothing' is missing from storage"):
        storage.read("nothing")  # at once: a response must not begin with 200 and then break off
    with pytest.raises(ObjectMissing):
        storage.fetch("nothing", tmp_path / "file", "0" * 64)
    assert list(tmp_path.glob("file*")) == []


def test_files_go_there_and_back(storage: Storage, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(_content(2 * CHUNK + 7))
    stored = storage.put_file("a", source)
    storage.fetch("a", copy, stored.sha256)

    assert copy.read_bytes() == source.read_bytes()


def test_a_wrong_checksum_is_refused(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"good")
    stored = storage.put("a", b"expected")
    storage.put("a", b"rotten")
    with pytest.raises(ChecksumMismatch, match=stored.sha256):
        storage.fetch("a", path, stored.sha256)

    assert path.read_bytes() == b"good"
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["file"]


def test_a_fetch_that_is_called_off_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    stored = storage.put("a", _content(2 * CHUNK + 7))
    calls = iter([None, InterruptedError()])

    def check() -> None:
        if error := next(calls):
            raise error

    with pytest.raises(InterruptedError):
        storage.fetch("a", tmp_path / "file", stored.sha256, check)
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == []


@pytest.mark.parametrize("fails", [True, False])
def test_a_fetch_is_synced_as_it_comes(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The system tells an error of the disk once, at whichever sync is the next."""
    content = _content(4 * CHUNK + 7)
    stored = storage.put("a", content)
    monkeypatch.setattr(protocol, "_UNSYNCED", CHUNK)
    fsync, sizes = os.fsync, list[int]()

    def noted(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        if fails and len(sizes) == 1:
            raise OSError(errno.EIO, "no more")
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    with pytest.raises(OSError, match="no more") if fails else nullcontext():
        storage.fetch("a", tmp_path / "file", stored.sha256)
    assert sizes[0] < len(content)
    assert sizes[-1] == len(content) or fails
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ([] if fails else ["file"])


def test_listing(storage: Storage) -> None:
    keys = ["a", "b/1", "b/2/x", "b/2-y", "b2", "é/ä b+c%41", "Z"]
    for key in keys:
        storage.put(key, key.encode())

    assert sorted(storage.list("")) == sorted(keys)
    assert sorted(storage.list("b/")) == ["b/1", "b/2-y", "b/2/x"]
    assert sorted(storage.list("b/2")) == ["b/2-y", "b/2/x"]
    assert list(storage.list("nothing/here")) == []
    assert all(_read(storage, key) == key.encode() for key in keys)


def test_deleting(storage: Storage) -> None:
    for key in ("a/b/c", "a/d"):
        storage.put(key, b"1")
    storage.delete("a/b/c")
    storage.delete("a/b/c")

    assert list(storage.list("")) == ["a/d"]
    storage.put("a/b", b"a key where a folder was")
    assert _read(storage, "a/b") == b"a key where a folder was"


FORGED = [
    "",
    "/etc/passwd",
    "../up",
    "a/../../up",
    "a//b",
    "a/",
    ".",
    "..",
    "a/./b",
    ".tmp/x",
    "a/.hidden",
    "a\x00b",
    "a\nb",
    "..\\up",
    "x" * 256,
    "/".join(["x" * 100] * 10),
]


@pytest.mark.parametrize("key", FORGED)
def test_a_forged_key_is_refused(storage: Storage, key: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: storage.put(key, b"x"),
        lambda: storage.read(key),
        lambda: storage.stat(key),
        lambda: storage.delete(key),
        lambda: storage.writer(key),
        lambda: storage.presign(key, filename="x") or check_key(key),
    ]
    for action in actions:
        with pytest.raises(ValueError, match="is not a storage key"):
            action()
    assert list(storage.list("")) == []


def test_a_prefix_keeps_two_services_apart(seaweed: Seaweed, s3_settings: Settings) -> None:
    other = s3_settings.model_copy(update={"storage_url": f"{s3_settings.storage_url}-other"})
    open_storage(s3_settings).put("a", b"1")

    assert open_storage(other).stat("a") is None
    assert list(open_storage(other).list("")) == []
