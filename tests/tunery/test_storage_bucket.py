"""What only S3 can do, and failures that only S3 can have."""

import hashlib
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import botocore.auth
import pytest
import seaweed as server
from proxy import Proxy, proxy_to
from pydantic import SecretStr
from seaweed import BUCKET, Seaweed

from tunery.errors import WrongSettings
from tunery.settings import Settings
from tunery.storage import CHUNK, Storage, disposition, open_storage, open_usable_storage
from tunery.storage.bucket import PART
from tunery.storage.errors import ObjectMissing, StorageFailed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def storage(s3_settings: Settings) -> Storage:
    return open_storage(s3_settings)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[Proxy]:
    with proxy_to(seaweed.endpoint) as proxy:
        yield proxy


def _behind(proxy: Proxy, settings: Settings) -> Storage:
    return open_storage(settings.model_copy(update={"s3_endpoint_url": proxy.url}))


def _get(url: str) -> tuple[int, bytes, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers.get("content-disposition", "")
    except HTTPError as error:
        with error:
            return error.code, error.read(), ""


def _refused(settings: Settings) -> str:
    with pytest.raises(WrongSettings, match="The operator has to change a setting") as error:
        open_usable_storage(settings)
    return error.value.message


def test_a_refusal_names_the_setting_to_change(s3_settings: Settings) -> None:
    wrong = s3_settings.model_copy(update={"aws_secret_access_key": SecretStr("not-the-secret")})
    message = _refused(wrong)
    assert "AWS_SECRET_ACCESS_KEY" in message
    assert "not-the-secret" not in message
    assert "a bucket that exists" in _refused(s3_settings.model_copy(update={"storage_url": "s3://nowhere"}))
    with pytest.raises(StorageFailed, match="AWS_SECRET_ACCESS_KEY"):
        open_storage(wrong).put("a", b"1")


def test_clocks_that_differ_are_named(s3_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = datetime.now(UTC) + timedelta(minutes=30)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda remove_tzinfo=True: ahead)
    assert "clock" in _refused(s3_settings)


def test_a_server_that_does_not_answer_yet_is_only_warned_of(
    s3_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    open_usable_storage(s3_settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"}))
    assert "could not list (EndpointConnectionError)" in caplog.text


def test_a_presigned_url_downloads_one_object_under_its_name(storage: Storage) -> None:
    storage.put("a/model", b"weights")
    storage.put("a/other", b"not yours")
    url = storage.presign("a/model", filename='adapter "ä".safetensors')
    assert url is not None

    status, body, name = _get(url)
    assert (status, body) == (200, b"weights")
    assert name == disposition('adapter "ä".safetensors')
    assert "X-Amz-Expires=900" in url
    assert _get(url.replace("a/model", "a/other"))[0] == 403
    assert _get(re.sub("X-Amz-Expires=900", "X-Amz-Expires=90000", url))[0] == 403
    assert _get(url.partition("?")[0])[0] == 403


def test_a_presigned_url_expires(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("a", b"1")
    yesterday = datetime.now(UTC) - timedelta(days=1)
    # The test does not wait: a URL that was signed yesterday has expired.
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda remove_tzinfo=True: yesterday)
    url = storage.presign("a", filename="a", seconds=3600)
    assert url is not None
    assert f"X-Amz-Date={yesterday:%Y%m%d}" in url
    assert _get(url)[0] == 403


def test_a_presigned_url_names_the_public_endpoint(s3_settings: Settings, seaweed: Seaweed) -> None:
    public = seaweed.endpoint.replace("127.0.0.1", "localhost")
    storage = open_storage(s3_settings.model_copy(update={"s3_public_endpoint_url": public}))
    storage.put("a", b"1")
    url = storage.presign("a", filename="a")
    assert url is not None
    assert urlsplit(url).netloc == public.removeprefix("http://")
    assert _get(url)[:2] == (200, b"1")


@pytest.mark.parametrize(
    ("filename", "plain"),
    [
        ("model.safetensors", "model.safetensors"),
        ('a"b\\c\r\nx: y', "a_b_c__x: y"),
        ("müsli 100%.csv", "m_sli 100_.csv"),
    ],
)
def test_a_disposition_cannot_break_the_header(filename: str, plain: str) -> None:
    header = disposition(filename)
    assert header.startswith(f"attachment; filename=\"{plain}\"; filename*=UTF-8''")
    assert header.isascii()
    assert header.isprintable()


def test_parts_carry_checksums(storage: Storage, s3_settings: Settings, seaweed: Seaweed) -> None:
    with storage.writer("big", "application/json") as writer:
        for _ in range(3):
            writer.write(b"x" * PART)
    prefix = urlsplit(s3_settings.storage_url).path.strip("/")
    head = seaweed.client().head_object(Bucket=BUCKET, Key=f"{prefix}/big", ChecksumMode="ENABLED")

    assert head["ETag"].strip('"').endswith("-3")
    assert head["ContentType"] == "application/json"
    assert head["ChecksumCRC32"]


def test_a_byte_that_changes_on_its_way_in_is_refused(s3_settings: Settings, proxy: Proxy, storage: Storage) -> None:
    proxy.on_request = lambda data: data.replace(b"precious", b"Precious")
    with pytest.raises(StorageFailed, match=r"BadDigest|XAmzContentSHA256Mismatch"):
        _behind(proxy, s3_settings).put("a", b"precious")
    with (
        pytest.raises(StorageFailed, match=r"BadDigest|XAmzContentSHA256Mismatch"),
        _behind(proxy, s3_settings).writer("b") as writer,
    ):
        writer.write(b"precious" + b"x" * PART)

    assert list(storage.list("")) == []


def test_a_read_goes_on_where_its_connection_broke(s3_settings: Settings, proxy: Proxy, storage: Storage) -> None:
    data = hashlib.shake_128(b"x").digest(5 * CHUNK)
    storage.put("a", data)
    proxy.cuts = [2 * CHUNK + 77, CHUNK, 2000]

    assert b"".join(_behind(proxy, s3_settings).read("a")) == data
    assert proxy.cuts == []


def test_a_broken_read_does_not_go_on_in_another_object(s3_settings: Settings, proxy: Proxy, storage: Storage) -> None:
    storage.put("a", b"old " * CHUNK)
    proxy.cuts = [CHUNK + 1000]
    chunks = _behind(proxy, s3_settings).read("a")
    next(chunks)
    storage.put("a", b"new " * CHUNK)

    with pytest.raises(StorageFailed, match="another object has replaced it"):
        b"".join(chunks)


def test_a_wrong_secret_is_named_by_its_code(s3_settings: Settings) -> None:
    wrong = s3_settings.model_copy(update={"aws_secret_access_key": SecretStr("guess")})
    with pytest.raises(StorageFailed, match="could not write \\(SignatureDoesNotMatch\\)"):
        open_storage(wrong).put("a", b"1")


def test_a_missing_bucket_is_no_missing_object(s3_settings: Settings) -> None:
    elsewhere = open_storage(s3_settings.model_copy(update={"storage_url": "s3://no-such-bucket/x"}))
    with pytest.raises(StorageFailed, match="NoSuchBucket"):
        elsewhere.read("a")


def test_nobody_there(s3_settings: Settings) -> None:
    nobody = open_storage(s3_settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"}))
    with pytest.raises(StorageFailed, match="EndpointConnectionError"):
        nobody.stat("a")


def test_sweeping_takes_old_uploads_only(s3_settings: Settings, storage: Storage, seaweed: Seaweed) -> None:
    client, prefix = seaweed.client(), urlsplit(s3_settings.storage_url).path.strip("/")
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/lost")

    assert storage.sweep(older_than_seconds=3600) == 0
    assert storage.sweep(older_than_seconds=-60) == 1
    assert storage.sweep(older_than_seconds=-60) == 0


def _kill_half_way(storage: Storage, weed: "subprocess.Popen[bytes]") -> None:
    with storage.writer("half") as writer:
        for number in range(8):
            writer.write(b"x" * PART)
            if number == 3:
                weed.kill()
                weed.wait()


@pytest.mark.slow
def test_a_server_that_dies_in_mid_upload_keeps_nothing_of_it(s3_settings: Settings, tmp_path: Path) -> None:
    with server.running(tmp_path) as (weed, running):
        settings = s3_settings.model_copy(
            update={"s3_endpoint_url": weed.endpoint, "aws_secret_access_key": SecretStr(weed.secret_key)}
        )
        storage = open_storage(settings)
        storage.put("acknowledged", b"1" * 1000)
        with pytest.raises(StorageFailed):
            _kill_half_way(storage, running)


_WRITE_A_GIBIBYTE = """
from bench.process_memory import host_bytes
from tunery.settings import Settings
from tunery.storage import open_storage
with open_storage(Settings()).writer("big") as writer:
    for _ in range(1024):
        writer.write(bytes(2**20))
print(writer.stored.bytes, host_bytes() // 2**20)
"""


@pytest.mark.slow
def test_a_gibibyte_takes_no_gibibyte_of_memory(s3_settings: Settings, storage: Storage) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _WRITE_A_GIBIBYTE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    size, peak = map(int, run.stdout.split())
    assert size == storage.stat("big") == 2**30
    assert peak < 300
    storage.delete("big")
    with pytest.raises(ObjectMissing):
        storage.read("big")
