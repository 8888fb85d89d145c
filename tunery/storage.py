"""Objects by key, in a directory or in an S3 bucket, behind one protocol and one conformance suite.

Keys are made by the server, never by a user: user names travel as metadata only. All calls block; whoever streams from
an event loop calls them in a thread. Memory stays constant whatever an object's size.
"""

import base64
import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tunery.errors import ChecksumMismatch, KeyTaken, ObjectMissing, StorageFailed
from tunery.settings import Settings

CHUNK = 2**20
"""Bytes per chunk of a read."""
PART = 16 * 2**20
"""Bytes per part of an S3 multipart upload; two parts are on their way at a time."""
_PARTS = 5_000
"""After so many parts (80 GiB) the rest are four times as large, as S3 takes at most 10,000: 400 GiB in all."""
_PRESIGN_SECONDS = 900
_READ_TRIES = 5


@dataclass(frozen=True)
class Stored:
    """What lies under a key now: its size in bytes and its sha256 in hex."""

    key: str
    bytes: int
    sha256: str


class Storage(Protocol):
    """Where objects lie. Every method may raise StorageFailed (try again); writes that raise leave nothing behind."""

    def writer(self, key: str, content_type: str | None = None) -> contextlib.AbstractContextManager["Writer"]:
        """Stream an object in. It appears whole at the clean end of the block, replacing an older one, or not at all."""

    def put(self, key: str, data: bytes, if_absent: bool = False) -> Stored:
        """Store a small object. Raises KeyTaken with `if_absent` where one is: of many writers exactly one wins."""

    def put_file(self, key: str, path: Path) -> Stored:
        """Store a local file. Size and sha256 in the answer are those of the bytes that were sent."""

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on, in chunks; nothing past the end. Raises ObjectMissing at once, not at the first chunk."""

    def fetch(self, key: str, path: Path, sha256: str) -> None:
        """Bring an object to a local file. Raises ObjectMissing, or ChecksumMismatch, and then `path` is untouched."""

    def presign(self, key: str, *, filename: str, seconds: int = _PRESIGN_SECONDS) -> str | None:
        """A URL that downloads this one object as `filename` without any key; None where storage cannot do that."""

    def stat(self, key: str) -> int | None:
        """Size in bytes, None where there is no such object."""

    def delete(self, key: str) -> None:
        """Forget an object; no error where there is none."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, sorted by their UTF-8 bytes."""

    def sweep(self, older_than_seconds: float = 86_400) -> int:
        """Remove what writers that died left half-written. Returns how many."""


def open_storage(settings: Settings) -> Storage:
    """The storage that `settings.storage_url` names: file:///DIR or s3://BUCKET[/PREFIX]. Raises ValueError."""
    url = urlsplit(settings.storage_url)
    if url.scheme == "file" and not url.netloc and url.path.startswith("/"):
        return Directory(Path(unquote(url.path)))
    if url.scheme == "s3" and url.netloc:
        return Bucket(settings, url.netloc, url.path.strip("/"))
    raise ValueError(f"TUNERY_STORAGE_URL is '{settings.storage_url}'; use file:///DIRECTORY or s3://BUCKET/PREFIX.")


_PART_OF_KEY = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")


def check_key(key: str) -> str:
    """The key itself, if it is one: parts joined by `/`, none hidden, `..` or empty. Raises ValueError.

    A wrong key is a fault of ours or a forged manifest, never a user's typing error, hence no message for users.
    """
    parts = key.split("/")
    if len(key.encode()) > 900 or any(len(p.encode()) > 255 or not _PART_OF_KEY.fullmatch(p) for p in parts):
        raise ValueError(
            f"{key!r} cannot be a storage key: give 1 to 900 bytes, parts joined by '/', none starting with '.'"
        )
    return key


class _Sink(Protocol):
    """The half of a writer that knows where bytes go."""

    def write(self, data: bytes) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None: ...


class Writer:
    """Counts and hashes what it passes on. `stored` is there after a clean end of the `with` block."""

    def __init__(self, key: str, sink: _Sink) -> None:
        self._key, self._sink = key, sink
        self._sha256, self._bytes = hashlib.sha256(), 0
        self._stored: Stored | None = None

    def write(self, data: bytes) -> None:
        self._sha256.update(data)
        self._bytes += len(data)
        self._sink.write(data)

    @property
    def stored(self) -> Stored:
        if self._stored is None:
            raise RuntimeError(f"'{self._key}' is not stored until its `with` block has ended")
        return self._stored

    def finish(self) -> None:
        self._sink.finish()
        self._stored = Stored(self._key, self._bytes, self._sha256.hexdigest())


@contextlib.contextmanager
def _writing(key: str, sink: _Sink) -> Iterator[Writer]:
    writer = Writer(key, sink)
    try:
        yield writer
        writer.finish()
    except BaseException:  # KeyboardInterrupt too: half an object must not stay
        sink.discard()
        raise


def _copy(path: Path, writer: Writer) -> None:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            writer.write(data)


def _fetch(storage: Storage, key: str, path: Path, expected: str) -> None:
    """Into a neighbour of `path` first: a reader of `path` never sees half a file nor a wrong one."""
    found = hashlib.sha256()
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for data in storage.read(key):
                found.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if found.hexdigest() != expected:
            raise ChecksumMismatch(key=key, expected=expected, found=found.hexdigest())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# A directory ------------------------------------------------------------------------------------------------------


class Directory:
    """Objects as files below `root`. Half-written ones lie in `root/.tmp`, on the same file system, so a rename is atomic."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._temporary = self._root / ".tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        path = self._root / check_key(key)
        # The key is harmless by now, but a symbolic link below the root could still lead out of it.
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(f"{key!r} leads out of the storage directory through a symbolic link")
        return path

    def writer(self, key: str, content_type: str | None = None) -> contextlib.AbstractContextManager[Writer]:
        return _writing(key, _FileSink(self._temporary, self._path(key)))

    def put(self, key: str, data: bytes, if_absent: bool = False) -> Stored:
        with _writing(key, _FileSink(self._temporary, self._path(key), if_absent=if_absent)) as writer:
            writer.write(data)
        return writer.stored

    def put_file(self, key: str, path: Path) -> Stored:
        with self.writer(key) as writer:
            _copy(path, writer)
        return writer.stored

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        try:
            file = self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectMissing(key=key) from None
        file.seek(start)

        def chunks() -> Iterator[bytes]:
            with file:
                while data := file.read(CHUNK):
                    yield data

        return chunks()

    def fetch(self, key: str, path: Path, sha256: str) -> None:
        _fetch(self, key, path, sha256)

    def presign(self, key: str, *, filename: str, seconds: int = _PRESIGN_SECONDS) -> str | None:
        return None

    def stat(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        for folder in path.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already
                break

    def list(self, prefix: str) -> Iterator[str]:
        found = []
        for folder, folders, files in os.walk(self._root / prefix.rpartition("/")[0]):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(folder).relative_to(self._root)
            found += [key for name in files if (key := (below / name).as_posix()).startswith(prefix)]
        yield from sorted(found, key=str.encode)

    def sweep(self, older_than_seconds: float = 86_400) -> int:
        limit = time.time() - older_than_seconds
        stale = [path for path in self._temporary.iterdir() if path.stat().st_mtime < limit]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)


class _FileSink:
    """Temporary file, fsync, rename, fsync of the folder: after a power cut the object is whole or absent."""

    def __init__(self, temporary: Path, path: Path, *, if_absent: bool = False) -> None:
        self._path, self._if_absent = path, if_absent
        with self._failing("open"):
            handle, name = tempfile.mkstemp(dir=temporary)
        self._file, self._name = os.fdopen(handle, "wb"), Path(name)

    @contextlib.contextmanager
    def _failing(self, deed: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise KeyTaken(key=self._path.name) from None
        except OSError as error:
            raise StorageFailed(deed=deed, reason=error.strerror or type(error).__name__) from error

    def write(self, data: bytes) -> None:
        with self._failing("write"):
            self._file.write(data)

    def finish(self) -> None:
        with self._failing("write"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._move()
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _move(self) -> None:
        for _ in range(10):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A delete of the folder's last object may remove it between the two lines: then make it again.
            with contextlib.suppress(FileNotFoundError):
                return self._link() if self._if_absent else os.replace(self._name, self._path)
        raise OSError(f"'{self._path.parent}' vanished ten times")

    def _link(self) -> None:
        os.link(self._name, self._path)  # unlike rename, fails where the name exists
        self._name.unlink()

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._name.unlink(missing_ok=True)


# A bucket ---------------------------------------------------------------------------------------------------------


def _client(settings: Settings, endpoint: str | None) -> Any:
    secret = settings.aws_secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.aws_region,
        aws_access_key_id=settings.aws_access_key_id and settings.aws_access_key_id.get_secret_value(),
        aws_secret_access_key=secret and secret.get_secret_value(),
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=5,
            read_timeout=60,
            tcp_keepalive=True,
            request_checksum_calculation="when_supported",
            response_checksum_validation="when_supported",
        ),
    )


@contextlib.contextmanager
def _translated(deed: str, key: str) -> Iterator[None]:
    """boto's exceptions as ours. What S3 said goes into the message by its code only: its texts may hold addresses."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))
        if code in ("NoSuchKey", "NotFound", "404"):
            raise ObjectMissing(key=key) from None
        if code in ("PreconditionFailed", "412"):
            raise KeyTaken(key=key) from None
        raise StorageFailed(deed=deed, reason=code) from error
    except BotoCoreError as error:
        raise StorageFailed(deed=deed, reason=type(error).__name__) from error


class Bucket:
    """Objects in an S3 bucket, below `prefix`. Every upload carries a checksum that the server verifies."""

    def __init__(self, settings: Settings, bucket: str, prefix: str = "") -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._s3 = _client(settings, settings.s3_endpoint_url)
        public = settings.s3_public_endpoint_url
        self._public = _client(settings, public) if public else self._s3

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def writer(self, key: str, content_type: str | None = None) -> contextlib.AbstractContextManager[Writer]:
        extra = {"ContentType": content_type} if content_type else {}
        return _writing(key, _MultipartSink(self._s3, key, self._at(key), extra))

    def put(self, key: str, data: bytes, if_absent: bool = False) -> Stored:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        return _put(self._s3, key, {**self._at(key), **condition}, data)

    def put_file(self, key: str, path: Path) -> Stored:
        with self.writer(key) as writer:
            _copy(path, writer)
        return writer.stored

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        try:
            answer = self._get(key, start)
        except StorageFailed as error:
            if error.fields["reason"] == "InvalidRange":
                return iter(())
            raise
        return self._chunks(key, start, answer)

    def _get(self, key: str, start: int, etag: str | None = None) -> dict[str, Any]:
        part = {"Range": f"bytes={start}-"} if start else {}
        same = {"IfMatch": etag} if etag else {}
        with _translated("read", key):
            answer: dict[str, Any] = self._s3.get_object(**self._at(key), **part, **same)
        return answer

    def _chunks(self, key: str, position: int, answer: dict[str, Any]) -> Iterator[bytes]:
        """A connection lost half-way is taken up again where it broke, and only on the very same object (its ETag)."""
        etag, failures = answer["ETag"], 0
        while True:
            try:
                data = answer["Body"].read(CHUNK)
            except (BotoCoreError, OSError) as error:
                failures += 1
                if failures == _READ_TRIES:
                    raise StorageFailed(deed="read", reason=type(error).__name__) from error
                time.sleep(0.1 * 2**failures)
                answer = self._get(key, position, etag)
                continue
            if not data:
                return
            position, failures = position + len(data), 0
            yield data

    def fetch(self, key: str, path: Path, sha256: str) -> None:
        _fetch(self, key, path, sha256)

    def presign(self, key: str, *, filename: str, seconds: int = _PRESIGN_SECONDS) -> str | None:
        parameters = {**self._at(key), "ResponseContentDisposition": disposition(filename)}
        url: str = self._public.generate_presigned_url("get_object", Params=parameters, ExpiresIn=seconds)
        return url

    def stat(self, key: str) -> int | None:
        try:
            with _translated("look up", key):
                return int(self._s3.head_object(**self._at(key))["ContentLength"])
        except ObjectMissing:
            return None

    def delete(self, key: str) -> None:
        with _translated("delete", key):
            self._s3.delete_object(**self._at(key))

    def list(self, prefix: str) -> Iterator[str]:
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
        with _translated("list", prefix):
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"].removeprefix(self._prefix)

    def sweep(self, older_than_seconds: float = 86_400) -> int:
        limit, swept = datetime.now(UTC) - timedelta(seconds=older_than_seconds), 0
        pages = self._s3.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
        with _translated("sweep", self._prefix):
            for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
                if upload["Initiated"] < limit:
                    self._s3.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                    swept += 1
        return swept


def disposition(filename: str) -> str:
    """A Content-Disposition that downloads as `filename`, whatever characters it has (RFC 6266)."""
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def _put(s3: Any, key: str, request: dict[str, str], data: bytes) -> Stored:
    found = hashlib.sha256(data)
    request = {**request, "ChecksumSHA256": base64.b64encode(found.digest()).decode()}
    with _translated("write", key):
        _settled(lambda: s3.put_object(**request, Body=data))
    return Stored(key, len(data), found.hexdigest())


def _settled(write: Callable[[], Any]) -> Any:
    """S3 answers 409 to both of two conditional writes that meet; whoever asks again learns who won."""
    for _ in range(5):
        try:
            return write()
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != "ConditionalRequestConflict":
                raise
    return write()


class _MultipartSink:
    """Parts of PART bytes, two on their way at a time; what fits into one part is a single put."""

    def __init__(self, s3: Any, key: str, at: dict[str, str], extra: dict[str, str]) -> None:
        self._s3, self._key, self._at, self._extra = s3, key, at, extra
        self._buffer = bytearray()
        self._upload: str | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._flying: deque[Future[dict[str, Any]]] = deque()
        self._done: list[dict[str, Any]] = []
        self._sent = 0

    def write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= (size := PART if self._sent < _PARTS else 4 * PART):
            self._send(bytes(memoryview(self._buffer)[:size]))
            del self._buffer[:size]

    def _send(self, part: bytes) -> None:
        if self._upload is None or self._pool is None:
            with _translated("write", self._key):
                answer = self._s3.create_multipart_upload(**self._at, **self._extra, ChecksumAlgorithm="CRC32")
            self._upload, self._pool = answer["UploadId"], ThreadPoolExecutor(2, "tunery-s3-part")
        if len(self._flying) == 2:
            self._done.append(self._flying.popleft().result())
        self._sent += 1
        self._flying.append(self._pool.submit(self._upload_part, self._sent, part))

    def _upload_part(self, number: int, part: bytes) -> dict[str, Any]:
        with _translated("write", self._key):
            answer = self._s3.upload_part(
                **self._at, UploadId=self._upload, PartNumber=number, Body=part, ChecksumAlgorithm="CRC32"
            )
        checksum = {"ChecksumCRC32": answer["ChecksumCRC32"]} if "ChecksumCRC32" in answer else {}
        return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

    def finish(self) -> None:
        if self._upload is None:
            _put(self._s3, self._key, {**self._at, **self._extra}, bytes(self._buffer))
            return
        if self._buffer:
            self._send(bytes(self._buffer))
        self._done += [flight.result() for flight in self._flying]
        with _translated("write", self._key):
            self._s3.complete_multipart_upload(**self._at, UploadId=self._upload, MultipartUpload={"Parts": self._done})
        self._close()

    def _close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def discard(self) -> None:
        self._close()  # first: a part that lands after the abort would bring the upload back
        if self._upload is not None:
            # The cause is already on its way up; a failed abort must not hide it, and `sweep` comes by later.
            with contextlib.suppress(ClientError, BotoCoreError):
                self._s3.abort_multipart_upload(**self._at, UploadId=self._upload)
