"""Objects in an S3 bucket, on AWS or any server that speaks its API."""

import base64
import contextlib
import hashlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tunery.settings import Settings
from tunery.storage.errors import KeyTaken, ObjectMissing, StorageFailed, StorageRefused
from tunery.storage.protocol import CHUNK, PRESIGN_SECONDS, Check, Stored, Writer, check_key, copy, fetch, writing

PART = 16 * 2**20
"""Bytes per part of an S3 multipart upload; two parts are sent concurrently."""
_PARTS = 5_000
"""After so many parts (80 GiB) the rest are four times as large, as S3 takes at most 10,000: 400 GiB in all."""
_READ_TRIES = 5
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY should be a key that this server issued."
_REGION = "AWS_REGION should be the bucket's region, and TUNERY_S3_ENDPOINT_URL its server."
_CHANGE = {
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"), _KEYS),
    **dict.fromkeys(("NoCredentialsError", "PartialCredentialsError"), _KEYS),
    "AccessDenied": "the key in AWS_ACCESS_KEY_ID should be allowed to read, write, list and delete in the bucket of "
    "TUNERY_STORAGE_URL.",
    "NoSuchBucket": "TUNERY_STORAGE_URL should name a bucket that exists; create it, as Tunery does not.",
    "InvalidBucketName": "TUNERY_STORAGE_URL should be s3://BUCKET or s3://BUCKET/PREFIX.",
    "RequestTimeTooSkewed": "set this host's clock or the S3 server's, which differ by more than a quarter of an hour.",
    **dict.fromkeys(("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"), _REGION),
}
"""What the operator has to change, by the code of an S3 server's refusal or the name of boto's error."""


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
def _translated(action: str, key: str) -> Iterator[None]:
    """Translates boto's exceptions to ours. Of S3's error only the code is kept, as its text may contain addresses."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))
        if code in ("NoSuchKey", "NotFound", "404"):
            raise ObjectMissing(key=key) from None
        if code in ("PreconditionFailed", "412"):
            raise KeyTaken(key=key) from None
        raise _failure(action, code) from error
    except BotoCoreError as error:
        raise _failure(action, type(error).__name__) from error


def _failure(action: str, reason: str) -> StorageFailed:
    if reason in _CHANGE:
        return StorageRefused(action=action, reason=reason, advice=_CHANGE[reason])
    return StorageFailed(action=action, reason=reason)


class Bucket:
    """Objects in an S3 bucket, below `prefix`. Every upload carries a checksum that the server verifies."""

    def __init__(self, settings: Settings, bucket: str, prefix: str = "") -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._s3 = _client(settings, settings.s3_endpoint_url)
        public = settings.s3_public_endpoint_url
        self._public = _client(settings, public) if public else self._s3

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def check(self) -> None:
        with _translated("list", self._prefix):
            self._s3.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def writer(self, key: str, content_type: str | None = None) -> contextlib.AbstractContextManager[Writer]:
        extra = {"ContentType": content_type} if content_type else {}
        return writing(key, _MultipartSink(self._s3, key, self._at(key), extra))

    def put(self, key: str, data: bytes, if_absent: bool = False) -> Stored:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        return _put(self._s3, key, {**self._at(key), **condition}, data)

    def put_file(self, key: str, path: Path) -> Stored:
        with self.writer(key) as writer:
            copy(path, writer)
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
        try:
            with _translated("read", key):
                answer: dict[str, Any] = self._s3.get_object(**self._at(key), **part, **same)
        except KeyTaken:
            raise StorageFailed(action="read", reason="another object has replaced it in the meantime") from None
        return answer

    def _chunks(self, key: str, position: int, answer: dict[str, Any]) -> Iterator[bytes]:
        """Yields chunks; after a lost connection it resumes there, if the object is still the same (by its ETag)."""
        etag, failures = answer["ETag"], 0
        while True:
            try:
                data = answer["Body"].read(CHUNK)
            except (BotoCoreError, OSError) as error:
                failures += 1
                if failures == _READ_TRIES:
                    raise StorageFailed(action="read", reason=type(error).__name__) from error
                time.sleep(0.1 * 2**failures)
                answer = self._get(key, position, etag)
                continue
            if not data:
                return
            position, failures = position + len(data), 0
            yield data

    def fetch(self, key: str, path: Path, sha256: str, check: Check = lambda: None) -> None:
        fetch(self, key, path, sha256, check)

    def presign(self, key: str, *, filename: str, seconds: int = PRESIGN_SECONDS) -> str | None:
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
    """Returns a Content-Disposition that downloads as `filename`, with any characters (RFC 6266)."""
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def _put(s3: Any, key: str, request: dict[str, str], data: bytes) -> Stored:
    found = hashlib.sha256(data)
    request = {**request, "ChecksumSHA256": base64.b64encode(found.digest()).decode()}
    with _translated("write", key):
        _settled(lambda: s3.put_object(**request, Body=data))
    return Stored(key, len(data), found.hexdigest())


def _settled(write: Callable[[], Any]) -> Any:
    """Repeats a conditional write once: S3 answers 409 to both of two concurrent ones, and a retry decides."""
    for _ in range(5):
        try:
            return write()
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != "ConditionalRequestConflict":
                raise
    return write()


class _MultipartSink:
    """Uploads parts of PART bytes, two concurrently; an object that fits into one part is a single put."""

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
            # The original error is already being raised: a failed abort must not hide it, and `sweep` cleans up later.
            with contextlib.suppress(ClientError, BotoCoreError):
                self._s3.abort_multipart_upload(**self._at, UploadId=self._upload)
