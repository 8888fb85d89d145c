"""The operator's settings, read once from the environment (`TUNERY_*`)."""

import ipaddress
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tunery import setting_errors, urls
from tunery.errors import WrongSettings
from tunery.field_reasons import formed
from tunery.plugins import split

log = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _comma_separated(value: object) -> object:
    return split(value) if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _object(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError('should be a JSON object, as in {"H200": 4.5}') from None


def _long(secret: SecretStr) -> SecretStr:
    if len(secret) < 16:
        raise ValueError("should have at least 16 characters")
    return secret


HttpUrl = Annotated[str, AfterValidator(urls.check_http)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Every field is the environment variable `TUNERY_<FIELD>`; deploy/env.example shows them all."""

    # An empty variable counts as absent, so that merely uncommenting a line of env.example does not stop services.
    # Errors hide the values, some of which are secrets.
    model_config = SettingsConfigDict(
        env_prefix=setting_errors.PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[str, AfterValidator(urls.check_database)] = Field(
        "postgresql+psycopg://tunery@127.0.0.1:5432/tunery", description="SQLAlchemy URL"
    )
    broker_url: Annotated[str, AfterValidator(urls.check_broker)] = Field(
        "redis://127.0.0.1:6379/0", description="Redis or Valkey, for wake-ups only"
    )
    storage_url: Annotated[str, AfterValidator(urls.check_storage)] = Field(
        "file:///var/lib/tunery/objects", description="file:///DIR or s3://BUCKET[/PREFIX]"
    )
    s3_endpoint_url: HttpUrl | None = Field(
        None, description="An S3 server other than AWS; the keys come from AWS_* variables"
    )
    s3_public_endpoint_url: HttpUrl | None = Field(None, description="The same server's URL for users (presigned URLs)")

    organization: Annotated[str, *formed(r"[a-z0-9-]{1,32}", "1 to 32 lower-case letters, digits and hyphens")] = Field(
        "tunery", description="Third part of the names of tuned models (`ft:`)"
    )
    models_dir: Path = Field(
        Path("/var/lib/tunery/models"), description="Folder of this host's base models, one subfolder per manifest"
    )
    runs_dir: Path = Field(Path("/var/lib/tunery/runs"), description="Folder of this host's run directories")
    prepared_fraction: float = Field(
        0.1, ge=0, le=1, description="Share of the disk for the tokens of files that a worker keeps; 0: none"
    )

    server_url: HttpUrl = Field("http://127.0.0.1:8001", description="URL of the model server for the API")
    server_backend: str = Field(
        "embedded", description="Back end of the model server: `embedded`, `vllm` or a plug-in's"
    )
    server_qlora_base: Literal["as_scored", "unquantised"] = Field(
        "as_scored",
        description="Base on which a QLoRA adapter is served: the 4-bit base of its scorecard, or the unquantised base",
    )
    server_streams: int = Field(16, ge=1, description="Answers that the model server generates concurrently")
    server_places: int = Field(
        256, ge=0, description="Requests that may wait for the model server; further ones get a 429"
    )
    server_seconds: float = Field(600, gt=0, description="Time limit of an answer")
    server_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="Memory for the model server's bases and adapters. Absent: half of the device's memory",
    )
    server_cache_bytes: int | None = Field(
        None,
        ge=1,
        description="Memory for the keys and values of running answers and of cached prompts, and for recorded steps. "
        "Absent: an eighth of the device's memory",
    )
    server_cuda_graphs: bool = Field(
        True, description="Whether the model server records the steps of its answers as CUDA graphs, on a GPU"
    )
    server_pinned: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_separated)] = Field(
        (), description="Comma-separated ids of models that stay in the model server's memory after their first use"
    )
    served_check_rows: int = Field(
        32,
        ge=0,
        le=64,
        description="Test rows that the served model answers again before it is published; 0: none",
    )
    served_check_tokens: int = Field(64, ge=1, description="Tokens compared of each of these answers")
    served_check_seconds: float = Field(
        600, gt=0, description="Time limit of this check; after it the model is published uncompared"
    )
    vllm_replicas: Annotated[tuple[HttpUrl, ...], NoDecode, BeforeValidator(_comma_separated)] = Field(
        (), description="Comma-separated URLs of the vLLM servers behind the model server"
    )
    vllm_api_key: SecretStr | None = Field(None, description="Their `--api-key`")
    vllm_max_lora_rank: int = Field(
        16, ge=1, description="Their `--max-lora-rank`; jobs with a higher rank are refused"
    )
    vllm_adapters: int = Field(64, ge=1, description="Adapters that they keep loaded: their `--max-cpu-loras`")
    vllm_models_dir: Path | None = Field(
        None, description="`models_dir` of the model server as they see it. Absent: the same path"
    )
    serve_gpu: int | None = Field(
        None, ge=0, description="GPU of the model server, which is never used for training. Absent: CPU"
    )
    io_gpu: int | None = Field(
        None, ge=0, description="GPU of the I/O workers' baselines, which is never used for training. Absent: CPU"
    )

    gpu_hour_prices: Annotated[dict[str, Annotated[float, Field(ge=0)]], NoDecode, BeforeValidator(_object)] = Field(
        {}, description='JSON object of the price per hour of one device, by card, as in {"H200": 4.5, "CPU": 0.1}'
    )
    currency: Annotated[str, *formed("[A-Z]{3}", "three capital letters, as in EUR")] = Field(
        "USD", description="Currency of the prices; the built-in ones are in US dollars"
    )

    file_reports: bool = Field(True, description="Whether I/O workers make a report on every training file")

    webhook_allow: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_comma_separated)] = Field(
        (), description="Comma-separated networks that webhooks may reach besides public https addresses"
    )
    external_secret: Annotated[SecretStr, AfterValidator(_long)] | None = Field(
        None,
        description="Secret of at least 16 characters that encrypts the keys of baselines' external endpoints. Absent: "
        "external endpoints are disabled",
    )
    external_allow: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_comma_separated)] = Field(
        (), description="Comma-separated networks of external endpoints besides public https addresses"
    )
    result_files: Literal["auto", "base64", "plain"] = Field(
        "auto",
        description="Content of fine-tune-results files: auto = base64 for `Accept: application/binary`, else plain",
    )
    wandb_mode: Literal["off", "online", "offline"] = Field(
        "off", description="For jobs with Weights & Biases: send nothing, send, or store in `trackers_dir`"
    )
    wandb_api_key: SecretStr | None = Field(None, description="API key of Weights & Biases; only for training workers")
    wandb_base_url: HttpUrl | None = Field(
        None, description="URL of a Weights & Biases server other than the public one"
    )
    mlflow_tracking_uri: SecretStr | None = Field(
        None, description="MLflow's tracking URI, for jobs with MLflow; only for training workers"
    )
    trackers_dir: Path = Field(
        Path("/var/lib/tunery/trackers"), description="Folder of offline runs of Weights & Biases"
    )
    plugins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_separated)] = Field(
        (), description="Comma-separated Python modules that every service and trainer imports at start"
    )
    max_json_bytes: int = Field(2**20, ge=1, description="Limit of a request's JSON body")
    max_chat_bytes: int = Field(
        4 * 2**20, ge=1, description="Limit of the JSON body of a chat, or of a new base with its template"
    )
    max_file_bytes: int = Field(512 * 2**20, ge=1, description="Limit of the file in one request")
    max_upload_bytes: int = Field(8 * 2**30, ge=1, description="Limit of a whole Upload")
    max_part_bytes: int = Field(64 * 2**20, ge=1, description="Limit of one part of an Upload")
    requests_per_minute: int | None = Field(
        None, ge=0, description="Requests to models per minute and project, unless the project has its own limit"
    )
    tokens_per_minute: int | None = Field(None, ge=0, description="The same for tokens of prompts and answers together")
    open_requests: int = Field(64, ge=1, description="Concurrent requests to models per project and API process")
    lease_seconds: int = Field(600, ge=1, description="Time after which a silent worker loses its job")
    renew_seconds: Seconds = Field(
        10, description="Interval of a worker's lease renewals, at most a third of `lease_seconds`"
    )
    poll_seconds: Seconds = Field(15, description="Interval at which a worker polls the queue without a wake-up")
    sweep_seconds: Seconds = Field(5, description="Interval of the I/O worker's periodic tasks")
    preload_trainer: bool = Field(
        True,
        description="Keep a trainer process with its imports ready for the next job, which starts 6 to 20 s sooner for "
        "up to 1 GB per GPU of the slot's last job",
    )
    stop_grace_seconds: Seconds = Field(120, description="Time for a local save on pause or shutdown before SIGKILL")
    keep_events_days: int = Field(
        365, ge=0, description="Days after a job's end for which its events are kept; 0: no limit"
    )
    keep_metrics_days: int = Field(365, ge=0, description="The same for its metrics")
    keep_logs_days: int = Field(90, ge=0, description="The same for its logs")
    keep_deliveries_days: int = Field(
        30, ge=0, description="Days for which ended webhook deliveries are kept; 0: no limit"
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)] = Field(
        "INFO", description="Minimum level of the services' log messages"
    )

    aws_access_key_id: SecretStr | None = Field(None, validation_alias="AWS_ACCESS_KEY_ID")
    aws_secret_access_key: SecretStr | None = Field(None, validation_alias="AWS_SECRET_ACCESS_KEY")
    aws_region: str = Field("us-east-1", validation_alias="AWS_REGION")

    @model_validator(mode="after")
    def _lease_outlasts_renewals(self) -> Self:
        if self.renew_seconds > self.lease_seconds / 3:
            raise ValueError(
                f"TUNERY_RENEW_SECONDS ({self.renew_seconds:g}) should be at most a third of TUNERY_LEASE_SECONDS "
                f"({self.lease_seconds}), so that one late renewal loses no job: lower the former or raise the latter"
            )
        return self


def read_settings(**given: Any) -> Settings:
    """Returns the settings `given` and the environment's, and warns of misspelt ones. Raises WrongSettings."""
    for warning in setting_errors.misspelt(os.environ, tuple(Settings.model_fields)):
        log.warning(warning)
    try:
        return Settings(**given)
    except ValidationError as error:
        raise setting_errors.explain(error.errors()) from None


@lru_cache
def get_settings() -> Settings:
    """Returns the process's settings. Raises WrongSettings. Tests build their own `Settings(...)` and pass it on."""
    return read_settings()


def make_folders(settings: Settings, *names: str) -> None:
    """Creates the directories of these settings, of which a service needs a few. Raises WrongSettings."""
    for name in names:
        folder: Path = getattr(settings, name)
        with setting_errors.making_folder(name, folder):
            folder.mkdir(parents=True, exist_ok=True)


def settings_or_exit() -> Settings:
    """Returns the settings of a service that starts. Wrong ones end it with status 2 and a line for each."""
    with ending_if_wrong():
        return get_settings()


@contextmanager
def ending_if_wrong() -> Iterator[None]:
    """Ends a service that starts with status 2 and the message of a WrongSettings, without a traceback."""
    try:
        yield
    except WrongSettings as error:
        sys.stderr.write(f"Error: {error.message}\n")
        sys.exit(2)
