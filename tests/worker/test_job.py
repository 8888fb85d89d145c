"""Jobs from their submission to their model, through real workers and a real trainer."""

import json
from contextlib import suppress

import psutil
import pytest
from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.artifacts import manifest
from tunery.artifacts.model import Artifact
from tunery.datasets.model import File
from tunery.jobs.model import Checkpoint, HostDevice, Job, JobEvent, Metric
from tunery.jobs.states import FINAL
from tunery.models.model import Model
from tunery.planning.quote import Actual, Quote
from tunery.trainer_protocol import Score, Served


def test_a_job_runs_to_its_end_without_any_broker(workshop: Workshop) -> None:
    workshop.start("io")
    workshop.start("train", TUNERY_SERVED_CHECK_ROWS="2")
    workshop.until(lambda: _devices(workshop), "a worker that shows its device")  # or the quote is for a rented one
    workshop.base_alias = "gpt-4o-mini-2024-07-18"
    training = workshop.file(training_rows(12), checked=False)
    validation = workshop.file(training_rows(3, first=100))
    test = workshop.file(training_rows(2, first=200))
    job_id = workshop.submit(
        training, validation, test,
        hyperparameters={"n_epochs": 4, "batch_size": 4}, evaluation={"task_rows": 2},
    )  # fmt: skip

    checks = _checks_until_the_end(workshop, job_id)
    job = workshop.until_state(job_id, "succeeded")

    assert checks == [["--wait"]], "the model was checked by the process that waited for it"
    assert (job.step, job.total_steps, job.failures, job.phase) == (12, 12, 0, None)
    assert job.trained_tokens
    assert job.finished_at is not None
    assert job.estimated_finish is None
    _check_story(workshop, job_id, f"{training} and validation file: {validation}", str(job.tuned_model))
    _check_metrics(workshop, job_id)
    _check_model(workshop, str(job.tuned_model))
    _check_results(workshop, str(job.result_file))
    _check_checkpoints(workshop, job_id)
    assert Score.model_validate(job.scorecard).rows == 2
    served = Served.model_validate(job.served)
    assert (served.status, served.rows, served.equal, served.withheld) == ("equal", 2, 2, False)
    assert served.summary in workshop.story(job_id)
    _check_quote(workshop, job)
    (attempt,) = workshop.attempts(job_id)
    assert (attempt.outcome, attempt.lease_until) == ("succeeded", None)
    assert "trainable params: 2,048" in workshop.log(job_id)
    snapshots = f"jobs/{job_id}/{attempt.number}/snapshots/"
    workshop.until(lambda: not list(workshop.storage.list(snapshots)), "no snapshot is left")
    left = workshop.settings.runs_dir / job_id / str(attempt.number)
    workshop.until(lambda: [path.name for path in left.iterdir()] == ["log.txt"], "a tidy run directory")
    (device,) = _devices(workshop)
    assert (device.gpu_index, device.memory_bytes > 2**28) == (None, True)


def _checks_until_the_end(workshop: Workshop, job_id: str) -> list[list[str]]:
    """Returns the arguments of each process that was to check the job's model, in the order of their start."""
    found: dict[int, list[str]] = {}

    def has_ended() -> bool:
        for process in workshop.trainers():
            with suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if "worker.server.check" in command:
                    found[process.pid] = command[3:]
        return workshop.job(job_id).state in FINAL

    workshop.until(has_ended, f"the end of {job_id}")
    return list(found.values())


def _check_story(workshop: Workshop, job_id: str, files: str, model: str) -> None:
    events = workshop.story(job_id)
    wanted = [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {files}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "trainable params: 2,048 || all params: 37,280 || trainable: 5.49% || adapted or trained linear weights: "
        "100.0%",
        f"New fine-tuned model created: {model}",
        "The job has successfully completed",
    ]
    assert [line for line in events if line in wanted] == wanted
    assert any(line.startswith("Scorecard on 2 test rows: exact match") for line in events)


def _devices(workshop: Workshop) -> list[HostDevice]:
    with workshop.session() as session:
        return list(session.scalars(select(HostDevice)))


def _check_quote(workshop: Workshop, job: Job) -> None:
    """Checks that the quote was a guess, as nothing had run before, and that the event states what the run took."""
    quoted, actual = Quote.model_validate(job.quote), Actual.model_validate(job.actual)
    assert (quoted.device, quoted.speed_from, quoted.tokens_from) == ("CPU", "estimated", "rows")
    assert quoted.tokens == job.trained_tokens
    assert actual.of_quoted == pytest.approx(actual.seconds / quoted.seconds.expected, abs=0.01)
    assert (actual.device, actual.gpus, actual.gpu_hours, actual.cost) == ("CPU", 0, 0, None)
    (attempt,) = workshop.attempts(job.id)
    assert attempt.ended_at is not None
    took = (attempt.ended_at - attempt.started_at).total_seconds()
    assert actual.seconds == pytest.approx(took, abs=1)
    assert any(line.startswith("The run took ") and " quoted were " in line for line in workshop.story(job.id))
    kept = job.actual["kept"]
    assert (kept["steps"], kept["step_times"]["steps"], kept["spent"]["answer"]["units"]) == (12, 11, 2 * 2)
    assert kept["spent"]["scores"]["seconds"] > 0
    assert kept["spent"]["rows"]["units"] == (job.trained_tokens + kept["spent"]["validation"]["units"]) / 4  # epochs
    assert "seconds_left" not in job.progress, "of the last step; the job has its `estimated_finish`"
    timed = job.progress["latency"]
    assert (timed["device"], timed["p50_seconds"] > 0, timed["prompt_tokens"] > timed["answer_tokens"]) == (
        "cpu", True, True,
    )  # fmt: skip
    assert sum(part["seconds"] for part in kept["spent"].values()) <= kept["trainer_seconds"] <= actual.seconds


def _check_metrics(workshop: Workshop, job_id: str) -> None:
    with workshop.session() as session:
        measured = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)).all()
    assert [metric.step for metric in measured] == list(range(1, 13))
    assert all(metric.values["train_loss"] > 0 for metric in measured)
    assert "full_valid_loss" in measured[2].values
    events = workshop.story(job_id, "metrics")
    assert [line.partition(":")[0] for line in events] == [f"Step {step}/12" for step in range(1, 13)]
    # The end of an epoch has one event for the step and for the loss on the whole validation file after it.
    assert "full validation loss=" in events[2]
    assert [step for step, metric in enumerate(measured, start=1) if "task_score" in metric.values] == [3, 6, 9, 12]
    with workshop.session() as session:
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.message.like("Step % validation rows"))
        (first, *_) = session.scalars(query.order_by(JobEvent.seq)).all()
    assert first.message.startswith("Step 3: ")
    assert first.data is not None
    assert first.data["task_score"] == measured[2].values["task_score"]
    assert [sample.keys() for sample in first.data["samples"]] == [{"prompt", "wanted", "answer"}] * 2


def _check_model(workshop: Workshop, name: str) -> None:
    with workshop.session() as session:
        model = session.get_one(Model, name)
        files = session.scalars(select(Artifact).where(Artifact.model_id == name)).all()
    assert (model.kind, model.status, model.base_id, model.technique) == ("tuned", "ready", "tiny", "lora")
    assert name.startswith("ft:gpt-4o-mini-2024-07-18:tunery::")
    listed = manifest.load(workshop.storage, model.prefix, str(model.manifest_sha256))
    assert {file.path: file.sha256 for file in listed.files} == {file.path: file.sha256 for file in files}
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"} <= {f.path for f in files}
    for file in files:
        assert workshop.storage.stat(file.key) == file.bytes
    (adapter,) = (f for f in files if f.path == "adapter_config.json")
    config = json.loads(b"".join(workshop.storage.read(adapter.key)))
    assert config["base_model_name_or_path"] == "tiny"


def _check_results(workshop: Workshop, file_id: str) -> None:
    with workshop.session() as session:
        file = session.get_one(File, file_id)
    lines = b"".join(workshop.storage.read(file.key)).decode().splitlines()
    assert (file.purpose, file.status, file.filename) == ("fine-tune-results", "processed", "step_metrics.csv")
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(lines) == 13


def _check_checkpoints(workshop: Workshop, job_id: str) -> None:
    """Checks that the last three of four epochs are kept; the first one's model is hidden and its objects are gone."""
    with workshop.session() as session:
        kept = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)).all()
        models = session.scalars(select(Model).where(Model.job_id == job_id, Model.kind == "checkpoint")).all()
    assert [checkpoint.step for checkpoint in kept] == [6, 9, 12]
    assert all(checkpoint.metrics["full_valid_loss"] > 0 for checkpoint in kept)
    hidden = [model for model in models if model.deleted_at is not None]
    assert {model.id for model in models} - {model.id for model in hidden} == {kept.model_id for kept in kept}
    assert all(model.id.startswith("ft:gpt-4o-mini-2024-07-18:tunery::") for model in models)
    assert [list(workshop.storage.list(model.prefix)) for model in hidden] == [[]]
    shown = [model for model in models if model.deleted_at is None]
    assert all(workshop.storage.stat(f"{model.prefix}/manifest.json") for model in shown)
