"""Settings: which values are refused, and how services and commands say so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tunery.errors import WrongSettings
from tunery.settings import Settings, make_folders, read_settings

SECRET = "s3cr3t"
POSITIVE = (
    *("lease_seconds", "renew_seconds", "poll_seconds", "sweep_seconds", "stop_grace_seconds"),
    *("max_json_bytes", "max_chat_bytes", "max_file_bytes", "max_upload_bytes", "max_part_bytes"),
)


def _wrong(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WrongSettings) as error:
        read_settings()
    return error.value.message


@pytest.mark.parametrize("value", ["0", "-5"])
@pytest.mark.parametrize("name", POSITIVE)
def test_times_and_sizes_are_positive(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"TUNERY_{name.upper()}"
    message = _wrong(monkeypatch, **{variable: value})
    assert message in {f"{variable} should be at least 1.", f"{variable} should be more than 0."}


def test_a_lease_outlasts_three_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    message = _wrong(monkeypatch, TUNERY_LEASE_SECONDS="29")
    assert message.startswith("TUNERY_RENEW_SECONDS (10) should be at most a third of TUNERY_LEASE_SECONDS (29)")
    monkeypatch.setenv("TUNERY_LEASE_SECONDS", "30")
    assert read_settings().lease_seconds == 30


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TUNERY_LEASE_SECONDS", "abc", "should be a whole number."),
        ("TUNERY_POLL_SECONDS", "inf", "should be a finite number."),
        ("TUNERY_DATABASE_URL", "foo", "should begin with postgresql+psycopg://"),
        ("TUNERY_DATABASE_URL", f"postgres://tunery:{SECRET}@db/tunery", "should begin with postgresql+psycopg://"),
        ("TUNERY_DATABASE_URL", f"postgresql+psycopg://tunery:{SECRET}@db:port/tunery", "HOST:PORT/NAME"),
        ("TUNERY_DATABASE_URL", f"postgresql+psycopg://tunery:a@{SECRET}@db/tunery", "write @ as %40"),
        ("TUNERY_DATABASE_URL", f"postgresql+psycopg://tunery:a@b/{SECRET}@db/tunery", "write @ as %40"),
        ("TUNERY_GPU_HOUR_PRICES", "{", "should be a JSON object"),
        ("TUNERY_WEBHOOK_ALLOW", "foo", "network, as in 10.0.0.0/8"),
        ("TUNERY_RESULT_FILES", "zip", "'auto', 'base64' or 'plain'"),
        ("TUNERY_FILE_REPORTS", "perhaps", "should be true or false."),
        ("TUNERY_EXTERNAL_SECRET", SECRET, "should have at least 16 characters."),
        ("TUNERY_SERVE_GPU", "-1", "should be at least 0."),
        (
            "TUNERY_BROKER_URL",
            f"amqp://tunery:{SECRET}@broker",
            "should be the URL of Redis or Valkey, as in redis://HOST",
        ),
        ("TUNERY_BROKER_URL", "localhost:6379", "should be the URL of Redis or Valkey, as in redis://HOST:6379/0"),
        ("TUNERY_BROKER_URL", f"redis://:{SECRET}@broker:port/0", "should be the URL of Redis or Valkey"),
        *(
            ("TUNERY_STORAGE_URL", url, "should be file:///DIRECTORY with an absolute path, or s3://BUCKET or s3://B")
            for url in ("/srv/objects", "file://host/dir", "file:relative", "s3://", "s3:bucket", "https://bucket")
        ),
        ("TUNERY_S3_ENDPOINT_URL", "s3.example.com", "should be the URL of a server, as in http://HOST:8001."),
        ("TUNERY_S3_PUBLIC_ENDPOINT_URL", "https://", "should be the URL of a server"),
        ("TUNERY_SERVER_URL", "http://[::1", "should be the URL of a server"),
        ("TUNERY_WANDB_BASE_URL", "wandb.example.com", "should be the URL of a server"),
        ("TUNERY_VLLM_REPLICAS", "http://a:8000,b:8000", "should be the URL of a server"),
        ("TUNERY_ORGANIZATION", "My Firm", "should be 1 to 32 lower-case letters, digits and hyphens."),
        ("TUNERY_CURRENCY", "euro", "should be three capital letters, as in EUR."),
    ],
)
def test_a_wrong_value_is_one_line_without_the_value(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = _wrong(monkeypatch, **{name: value})
    assert message.startswith(f"{name} ")
    assert said in message
    assert SECRET not in message
    assert "\n" not in message
    with pytest.raises(ValidationError) as error:
        Settings()
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", f"postgresql+psycopg://tunery:a%40{SECRET}@[::1]:5433/tunery?sslmode=require"),
        ("database_url", "postgresql+psycopg://tunery@/tunery?host=/run/postgresql"),
        ("broker_url", f"rediss://:{SECRET}@broker:6380/1"),
        ("broker_url", "redis://broker"),
        ("broker_url", "redis+socket:///run/valkey.sock"),
        ("broker_url", "redis://a:6379/0;redis://b:6379/0"),  # tried in turn
        ("storage_url", "file:///srv/my%20objects"),
        ("storage_url", "s3://bucket/some/prefix"),
        ("server_url", "http://[::1]:8001"),
        ("s3_endpoint_url", "https://s3.example.com/path"),
    ],
)
def test_a_url_is_kept_as_it_is_written(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"TUNERY_{name.upper()}", value)
    assert getattr(read_settings(), name) == value


@pytest.mark.parametrize("name", ["models_dir", "runs_dir"])
def test_a_folder_that_is_there_but_cannot_be_written_to_is_refused(name: str) -> None:
    with pytest.raises(WrongSettings, match=f"TUNERY_{name.upper()} should name a directory that .*write to .*'/proc'"):
        make_folders(Settings(**{name: Path("/proc")}), name)


def test_each_wrong_variable_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    message = _wrong(monkeypatch, TUNERY_LEASE_SECONDS="abc", TUNERY_CURRENCY="euro")
    assert [line.split()[0] for line in message.splitlines()] == ["TUNERY_CURRENCY", "TUNERY_LEASE_SECONDS"]


def test_a_misspelt_variable_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("TUNERY_LEESE_SECONDS", "TUNERY_API_KEY", "TUNERY_API_URL", "TUNERY_OF_A_PLUG_IN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("TUNERY_LEASE_SECONDS", "300")
    read_settings()
    assert caplog.messages == [
        "TUNERY_LEESE_SECONDS is no setting and has no effect. Did you mean TUNERY_LEASE_SECONDS?"
    ]


@pytest.mark.parametrize(
    "command",
    [
        ("uvicorn", "--factory", "api.main:create_app", "--port", "0"),
        ("celery", "-A", "worker.app", "worker", "-Q", "io"),
        ("worker.server",),
        ("alembic", "current"),
        ("tunery.cli.main", "projects", "list"),
        ("tunery.cli.main", "up", "--home", "no/home"),
    ],
)
def test_a_service_or_command_ends_with_status_2_and_a_line_for_each(command: tuple[str, ...]) -> None:
    environment = {**os.environ, "TUNERY_LEASE_SECONDS": "abc", "TUNERY_EXTERNAL_SECRET": SECRET}
    ended = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    lines = sorted(ended.stderr.removeprefix("Error: ").splitlines())
    assert [line.split()[0] for line in lines] == ["TUNERY_EXTERNAL_SECRET", "TUNERY_LEASE_SECONDS"]
    assert SECRET not in ended.stdout


def test_migrations_of_a_database_that_is_down_end_with_one_line() -> None:
    environment = {**os.environ, "TUNERY_DATABASE_URL": f"postgresql+psycopg://tunery:{SECRET}@127.0.0.1:1/tunery"}
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("Error: The database at TUNERY_DATABASE_URL was not migrated: connection failed: ")
    assert SECRET not in line


_API = ("uvicorn", "--factory", "api.main:create_app", "--port", "0")
_WORKER = ("celery", "-A", "worker.app", "worker", "-Q", "io")


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        (_API, "TUNERY_STORAGE_URL", "file://{file}/objects"),
        (_WORKER, "TUNERY_STORAGE_URL", "file://{file}"),
        (_WORKER, "TUNERY_RUNS_DIR", "{file}"),
        (_WORKER, "TUNERY_MODELS_DIR", "{file}/models"),
        (("worker.server",), "TUNERY_STORAGE_URL", "file:///no%00directory"),
        (("worker.server",), "TUNERY_MODELS_DIR", "{file}/models"),
    ],
)
def test_a_directory_that_cannot_be_created_is_one_line(
    command: tuple[str, ...], variable: str, value: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, variable: value.format(file=file)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"Error: {variable} should name a directory that this service can create and write to (")
