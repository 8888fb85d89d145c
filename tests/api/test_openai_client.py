"""The unmodified official client makes every listed call: as people use it, and with strict response validation."""

import base64
import gzip
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import rows
from cloned_databases import Database
from fastapi import FastAPI
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from teams import ALIAS, BASE, LINE, SOURCE, TRAIN, Team

from tunery.jobs import ledger
from tunery.jobs.model import Checkpoint, Job, Metric
from tunery.jobs.states import State
from tunery.keys.model import Project

FAULTS = Path(__file__).parents[1] / "data" / "faults"
RECEIVER = "https://127.0.0.1:9/hooks"


@pytest.fixture(params=[False, True], ids=["lenient", "strict"])
def client(request: pytest.FixtureRequest, team: Team) -> OpenAI:
    return team.openai(strict=request.param)


@pytest.fixture
def file_id(client: OpenAI) -> str:
    return client.files.create(file=("train.jsonl", TRAIN), purpose="fine-tune").id


@pytest.fixture
def job(client: OpenAI, file_id: str, base: str) -> FineTuningJob:
    return client.fine_tuning.jobs.create(model=base, training_file=file_id)


def _bring(database: Database, job_id: str, state: State, **values: object) -> None:
    with database.sessions.begin() as session:
        row = session.get_one(Job, job_id)
        rows.bring(session, row, state)
        for name, value in values.items():
            setattr(row, name, value)


def test_files(client: OpenAI) -> None:
    made = client.files.create(
        file=("train.jsonl", TRAIN),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.bytes, made.filename, made.purpose, made.status) == (
        len(TRAIN),
        "train.jsonl",
        "fine-tune",
        "processed",
    )
    assert made.expires_at == made.created_at + 3600
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert client.files.content(made.id).read() == TRAIN
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [made.id]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve(made.id)
    assert refused.value.code == "not_found"
    assert refused.value.request_id


def test_files_come_as_bytes_and_as_open_files(client: OpenAI) -> None:
    assert client.files.create(file=TRAIN, purpose="fine-tune").filename == "upload"
    assert client.files.create(file=io.BytesIO(b"\x89PNG"), purpose="vision").bytes == 4


@pytest.mark.parametrize("name", ["bare_cr", "crcrlf", "bom_middle"])
def test_files_of_every_system_are_taken(client: OpenAI, name: str) -> None:
    data = (FAULTS / f"{name}.jsonl").read_bytes()
    made = client.files.create(file=(f"{name}.jsonl", data), purpose="fine-tune")
    assert (made.status, client.files.content(made.id).read()) == ("processed", data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(gzip.compress(TRAIN)), "is compressed with gzip twice. Decompress it once."),
        (b"PK\x03\x04", "is a zip archive, as Excel workbooks (.xlsx) are."),
        (TRAIN.decode().encode("utf-16"), "is in UTF-16. Save it as UTF-8."),
    ],
)
def test_another_kind_of_file_is_named(client: OpenAI, data: bytes, kind: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    assert refused.value.code == "invalid_jsonl"
    assert f"Line 1: the file {kind}" in refused.value.message


def test_file_pages(client: OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", TRAIN), purpose="fine-tune").id for n in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made


def test_upload_in_parts(client: OpenAI) -> None:
    upload = client.uploads.create(bytes=len(TRAIN), filename="t.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert upload.status == "pending"
    second = client.uploads.parts.create(upload.id, data=TRAIN[100:])
    first = client.uploads.parts.create(upload.id, data=TRAIN[:100])
    done = client.uploads.complete(
        upload.id, part_ids=[first.id, second.id], md5=hashlib.md5(TRAIN, usedforsecurity=False).hexdigest()
    )
    assert done.status == "completed"
    assert done.file
    assert done.file.status == "uploaded"
    assert client.files.content(done.file.id).read() == TRAIN


def test_upload_helper_and_cancel(client: OpenAI) -> None:
    done = client.uploads.upload_file_chunked(
        file=TRAIN, filename="t.jsonl", bytes=len(TRAIN), mime_type="text/jsonl", purpose="fine-tune", part_size=500
    )
    assert done.status == "completed"
    upload = client.uploads.create(bytes=4, filename="t.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert client.uploads.cancel(upload.id).status == "cancelled"


def test_job(client: OpenAI, job: FineTuningJob, file_id: str) -> None:
    assert job.status == "validating_files"
    assert job.training_file == file_id
    assert job.hyperparameters.n_epochs == "auto"
    assert job.method
    assert job.method.supervised
    assert job.error is None
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    assert [found.id for found in client.fine_tuning.jobs.list()] == [job.id]
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages == ["The job was cancelled", f"Created fine-tuning job: {job.id}"]


def test_job_with_everything(client: OpenAI, file_id: str, base: str) -> None:
    held_out = client.files.create(file=("valid.jsonl", LINE.replace("q", "v").encode()), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model=ALIAS,
        training_file=file_id,
        validation_file=held_out,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        suffix="banking",
        seed=42,
        metadata={"team": "search"},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}],
        extra_body={
            "technique": {"type": "lora", "r": 8, "alpha": 32, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
            "learning_rate": 1e-3,
            "early_stopping": {"patience": 2},
            "select": "best",
            "priority": 3,
        },
    )
    assert job.model == ALIAS
    assert (job.seed, job.metadata) == (42, {"team": "search"})
    assert job.hyperparameters.n_epochs == 2
    assert job.integrations
    assert job.integrations[0].wandb.project == "p"
    assert job.model_extra
    assert job.model_extra["base_model"] == base
    assert job.model_extra["user_provided_suffix"] == "banking"
    assert job.model_extra["technique"]["r"] == 8
    assert job.model_extra["priority"] == 3
    assert job.model_extra["warnings"] == []
    assert [e.level for e in client.fine_tuning.jobs.list_events(job.id)] == ["info"]


def test_preference_job(client: OpenAI, file_id: str, base: str) -> None:
    knobs = {"beta": 0.2, "n_epochs": 1, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file_id,
        method={"type": "dpo", "dpo": {"hyperparameters": knobs}},  # type: ignore[typeddict-item]
    )
    assert job.method
    assert (job.method.type, job.method.supervised) == ("dpo", None)
    assert job.method.dpo
    assert job.method.dpo.hyperparameters
    assert job.method.dpo.hyperparameters.to_dict() == {**knobs, "loss": "sigmoid"}
    assert client.fine_tuning.jobs.retrieve(job.id) == job


def test_models_named_by_hub_id(client: OpenAI, file_id: str, base: str) -> None:
    assert client.fine_tuning.jobs.create(model=SOURCE, training_file=file_id).model == base
    assert client.models.retrieve(SOURCE).id == base


def test_explicit_nulls(client: OpenAI, file_id: str, base: str) -> None:
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file_id,
        seed=None,
        suffix=None,
        validation_file=None,
        integrations=None,
        metadata=None,
    )
    assert isinstance(job.seed, int)


def test_job_pages_and_metadata_filter(client: OpenAI, file_id: str, base: str) -> None:
    create = client.fine_tuning.jobs.create
    made = [create(model=base, training_file=file_id, metadata={"n": str(n % 2)}).id for n in range(4)]
    bare = create(model=base, training_file=file_id).id
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == [bare, *made[::-1]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[3], made[1]]
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [bare]


def test_pause_and_resume(
    client: OpenAI, job: FineTuningJob, database: Database, request: pytest.FixtureRequest
) -> None:
    _bring(database, job.id, State.QUEUED)
    if "strict" in request.node.name:  # `paused` is in none of the client's enums
        with pytest.raises(openai.APIResponseValidationError):
            client.fine_tuning.jobs.pause(job.id)
    else:
        assert str(client.fine_tuning.jobs.pause(job.id).status) == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"


def test_finished_job(client: OpenAI, job: FineTuningJob, database: Database) -> None:
    _bring(database, job.id, State.SUCCEEDED, trained_tokens=1234, step=3, total_steps=3)
    with database.sessions.begin() as session:
        row = session.get_one(Job, job.id)
        ledger.note(
            session, row.id, "Step 3/3: training loss=0.15", type="metrics", data={"step": 3, "train_loss": 0.15}
        )
        session.add(Metric(job_id=row.id, step=1, values={"train_loss": 1.5}))
        for step in (1, 2, 3):
            metrics = {"train_loss": 1 / step}
            session.add(
                Checkpoint(id=f"ftckpt_{step}", job_id=row.id, step=step, model_id=row.tuned_model, metrics=metrics)
            )
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.finished_at
    assert done.trained_tokens == 1234
    assert (done.hyperparameters.n_epochs, done.hyperparameters.batch_size) == (1, 2)
    assert done.fine_tuned_model
    assert done.fine_tuned_model.startswith(f"ft:{BASE}:tunery::")
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [(c.step_number, c.metrics.step) for c in found] == [(3, 3), (2, 2), (1, 1)]
    newest = next(iter(client.fine_tuning.jobs.list_events(job.id)))
    assert newest.type == "metrics"
    assert newest.data == {"step": 3, "train_loss": 0.15}
    assert client.models.retrieve(done.fine_tuned_model).owned_by == "alpha"
    assert {model.id for model in client.models.list()} == {BASE, ALIAS, done.fine_tuned_model}
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError, match="404"):
        client.models.retrieve(done.fine_tuned_model)


def test_failed_job(client: OpenAI, job: FineTuningJob, database: Database) -> None:
    _bring(database, job.id, State.FAILED)
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed"
    assert failed.error
    assert (failed.error.code, failed.error.message) == ("job_failed", "for the test")


def test_result_file_is_base64_for_this_client(client: OpenAI, team: Team, database: Database, app: FastAPI) -> None:
    table = b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.52347,0.0,,\n"
    app.state.storage.put("files/results", table)
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        file = rows.file(session, owner, purpose="fine-tune-results", key="files/results", bytes=len(table))
    assert base64.b64decode(client.files.content(file.id).read()) == table
    plain = team.http.get(f"/v1/files/{file.id}/content")
    assert plain.content == table
    assert plain.headers["content-type"].startswith("text/csv")


def test_webhook_endpoints(client: OpenAI) -> None:
    types = client.webhooks.event_types.list()
    assert "fine_tuning.job.succeeded" in types.data
    made = client.webhooks.create(name="hook", url=RECEIVER, event_types=["fine_tuning.job.succeeded"])
    assert made.signing_secret.startswith("whsec_")
    assert client.webhooks.retrieve(made.id).updated_at == made.created_at
    renamed = client.webhooks.update(made.id, name="other")
    assert (renamed.name, renamed.url) == ("other", RECEIVER)
    rotated = client.webhooks.rotate_secret(made.id)
    for wrong in ("yes", 1):
        with pytest.raises(openai.BadRequestError, match="keep_old_secret_active_for_24_hours"):
            client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=wrong)  # type: ignore[arg-type]
    kept = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    null = {"keep_old_secret_active_for_24_hours": None}
    again = client.webhooks.rotate_secret(made.id, extra_body=null)
    secrets = (made.signing_secret, rotated.signing_secret, kept.signing_secret, again.signing_secret)
    assert len(set(secrets)) == 4
    assert [endpoint.id for endpoint in client.webhooks.list(limit=1)] == [made.id]
    assert client.webhooks.delete(made.id).deleted
    assert list(client.webhooks.list()) == []


def test_webhook_test_reaches_its_receiver(client: OpenAI, serve: Callable[[Any], str]) -> None:
    received: list[tuple[bytes, dict[str, str]]] = []

    async def receiver(request: Request) -> Response:
        received.append((await request.body(), dict(request.headers)))
        return Response(status_code=202)

    address = serve(Starlette(routes=[Route("/hooks", receiver, methods=["POST"])]))
    made = client.webhooks.create(name="hook", url=f"{address}/hooks", event_types=["fine_tuning.job.failed"])
    tested = client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert (tested.status_code, tested.success) == (202, True)
    [(body, headers)] = received
    event = client.webhooks.unwrap(body, headers, secret=made.signing_secret)
    assert event.type == "fine_tuning.job.failed"


def test_what_is_not_here_is_refused_by_name(client: OpenAI) -> None:
    grader = {"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"}
    with pytest.raises(openai.NotFoundError) as refused:
        client.fine_tuning.alpha.graders.validate(grader=grader)  # type: ignore[arg-type]
    assert "supervised" in str(refused.value.body)
    with pytest.raises(openai.NotFoundError) as refused:
        list(client.fine_tuning.checkpoints.permissions.list("ft:x:y::z:ckpt-step-1"))
    assert "permissions are not supported" in str(refused.value.body)
    with pytest.raises(openai.NotFoundError) as refused:
        client.batches.create(input_file_id="file-x", endpoint="/v1/chat/completions", completion_window="24h")
    assert "Send each request of the file" in str(refused.value.body)
    with pytest.raises(openai.NotFoundError) as refused:
        client.evals.runs.list("eval_x")
    assert "evaluation.test_file" in str(refused.value.body)


def test_wrong_key(team: Team) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        team.openai().with_options(
            api_key="sk-wrong", default_headers={"authorization": "Bearer sk-wrong"}
        ).models.list()
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("attempts", [1, 2])
def test_the_clients_own_retries_make_one_job(
    attempts: int, make_team: Callable[..., Team], file_id: str, job: FineTuningJob, client: OpenAI
) -> None:
    """The client sends `x-stainless-retry-count` when it repeats a create whose response was lost."""
    again = client.fine_tuning.jobs.create(
        model=BASE, training_file=file_id, extra_headers={"x-stainless-retry-count": str(attempts)}
    )
    assert again.id == job.id
    assert client.fine_tuning.jobs.create(model=BASE, training_file=file_id).id != job.id
