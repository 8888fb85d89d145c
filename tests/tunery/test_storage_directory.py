"""What only a directory can do, and failures that only a directory can have."""

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunery.storage import Directory
from tunery.storage.errors import StorageFailed


@contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """Limits all files to `size` bytes: the kernel then refuses writes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_older_object_and_no_rest(tmp_path: Path) -> None:
    storage = Directory(tmp_path)
    storage.put("a", b"older")
    with pytest.raises(StorageFailed, match="could not write"), _files_up_to(2**20):
        storage.put("a", b"x" * 2**22)

    assert b"".join(storage.read("a")) == b"older"
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_an_object_of_a_directory_that_is_not_mounted_is_not_taken_for_deleted(tmp_path: Path) -> None:
    """A job whose files are missing fails, and an ended job without objects is never cleaned again."""
    storage = Directory(tmp_path / "root")
    storage.put("a/b", b"1")
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageFailed, match="could not open"):
        storage.check()
    actions: tuple[Callable[[], object], ...] = (
        lambda: storage.read("a/b"),
        lambda: storage.stat("a/b"),
        lambda: storage.delete("a/b"),
        lambda: list(storage.list("a/")),
    )
    for action in actions:
        with pytest.raises(StorageFailed, match="is gone or not mounted"):
            action()
    (tmp_path / "elsewhere").rename(tmp_path / "root")
    assert storage.stat("a/b") == 1


def test_what_cannot_be_read_is_not_missing(tmp_path: Path) -> None:
    storage = Directory(tmp_path)
    with socket.socket(socket.AF_UNIX) as unreadable:
        unreadable.bind(str(tmp_path / "a"))  # opening it fails, also for root
        with pytest.raises(StorageFailed, match="could not read"):
            storage.read("a")
    with pytest.raises(StorageFailed, match="could not list"):
        list(storage.list(f"{'x' * 300}/"))
    assert list(storage.list("never-stored/")) == []


def test_a_symbolic_link_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("x")
    storage = Directory(tmp_path / "root")
    (tmp_path / "root/link").symlink_to(tmp_path / "outside")
    for action in (storage.read, storage.stat, storage.delete, storage.writer):
        with pytest.raises(ValueError, match="through a symbolic link"):
            action("link/secret")

    assert (tmp_path / "outside/secret").exists()


def test_a_writer_that_was_killed_is_swept_up(tmp_path: Path) -> None:
    storage = Directory(tmp_path)
    if (child := os.fork()) == 0:
        with storage.writer("a/b") as writer:
            writer.write(b"half")
            os._exit(9)
    os.waitpid(child, 0)

    assert list(storage.list("")) == []
    assert storage.sweep(older_than_seconds=3600) == 0, "a writer that is at work must not be swept"
    # `stat` fails on it as on a file that its writer has just renamed.
    (tmp_path / ".tmp" / "renamed").symlink_to("away")
    assert storage.sweep(older_than_seconds=-60) == 1
    (tmp_path / ".tmp" / "renamed").unlink()
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_empty_folders_go_with_their_last_object(tmp_path: Path) -> None:
    storage = Directory(tmp_path)
    storage.put("a/b/c", b"1")
    storage.delete("a/b/c")

    assert [path.name for path in tmp_path.iterdir()] == [".tmp"]
    assert storage.presign("a", filename="a") is None
