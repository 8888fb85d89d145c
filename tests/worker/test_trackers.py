"""Experiment trackers of real jobs: a process of the worker feeds them, and no job depends on them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import other_clients
import pytest
from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.jobs.model import Job, Metric

SECRET = "sk-secret-of-the-operator"
WANDB = {"type": "wandb", "wandb": {"project": "banking", "name": None, "entity": None, "tags": ["a"]}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment_name": "banking", "run_name": "first"}}


def _submit(workshop: Workshop, *integrations: dict[str, Any], test: bool = False) -> str:
    files = [workshop.file(training_rows(12))]
    options: dict[str, Any] = {"test": workshop.file(training_rows(10, 50))} if test else {}
    job_id = workshop.submit(*files, workshop.file(training_rows(10, 90)), **options)
    with workshop.session() as session:
        session.get_one(Job, job_id).integrations = list(integrations)
    return job_id


def _warnings(workshop: Workshop, job_id: str) -> list[str]:
    return [message for message in workshop.story(job_id) if "Weights & Biases" in message or "MLflow" in message]


@pytest.mark.slow
def test_a_job_goes_on_without_a_tracker_that_is_down(workshop: Workshop, tmp_path: Path) -> None:
    """One library fails with the key in its error text, as an HTTP client may; the other tracker is not set up."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "wandb.py").write_text(
        "import os\n"
        "def init(**_):\n"
        "    raise ConnectionError('no answer from https://x:' + os.environ['WANDB_API_KEY'])\n"
        "class Settings:\n    def __init__(self, **_): pass\n"
    )
    job_id = _submit(workshop, WANDB, MLFLOW)
    own = {"TUNERY_WANDB_MODE": "online", "TUNERY_WANDB_API_KEY": SECRET, "TUNERY_TRACKERS_DIR": str(tmp_path / "t")}
    workshop.start("io")
    workshop.start("train", PYTHONPATH=str(library), **own)
    workshop.until_state(job_id, "succeeded", seconds=240)
    assert sorted(_warnings(workshop, job_id)) == [
        "This server sends nothing to MLflow: the operator has not configured it (TUNERY_MLFLOW_TRACKING_URI)",
        "Weights & Biases receives nothing from this run (ConnectionError). The job continues without it",
    ]
    texts = [*workshop.story(job_id), workshop.log(job_id), *(path.read_text() for path in tmp_path.glob("*.log"))]
    assert [text for text in texts if SECRET in text] == []


READ_WANDB = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2 as pb
def records(path):  # a log of LevelDB behind seven bytes of W&B's own: blocks of 32 KiB, records in parts
    data, at, parts = open(path, "rb").read(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield pb.Record.FromString(parts)
            parts = b""
steps, run = {}, {}
for record in records(sys.argv[1]):
    if record.HasField("run"):
        run = {"project": record.run.project, "id": record.run.run_id, "name": record.run.display_name,
               "tags": list(record.run.tags),
               "config": {item.key: json.loads(item.value_json) for item in record.run.config.update}}
    if record.HasField("history"):
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        steps.setdefault(items.get("_step", record.history.step.num), {}).update(items)
print(json.dumps({"run": run, "steps": steps}))
"""
READ_MLFLOW = """
import json
from mlflow import MlflowClient
client = MlflowClient()
[run] = client.search_runs([client.get_experiment_by_name("banking").experiment_id])
history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train_loss")}
print(json.dumps({"name": run.info.run_name, "status": run.info.status, "params": run.data.params,
                  "tags": run.data.tags, "metrics": run.data.metrics, "losses": history}))
"""


def _read(script: str, path: str, *arguments: object, **names: str) -> Any:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, **names}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_real_trackers_get_all_offline(workshop: Workshop, tmp_path: Path) -> None:
    """Weights & Biases runs offline, MLflow writes to a folder; a server that does not answer gets nothing."""
    path = str(next((other_clients.install("trackers") / "lib").glob("python*")) / "site-packages")
    job_id = _submit(workshop, WANDB, MLFLOW, test=True)
    store = f"file://{tmp_path}/mlflow"
    own = {"TUNERY_WANDB_MODE": "offline", "TUNERY_TRACKERS_DIR": str(tmp_path / "t")}
    workshop.start("io")
    worker = workshop.start("train", PYTHONPATH=path, TUNERY_MLFLOW_TRACKING_URI=store, **own)
    workshop.until_state(job_id, "succeeded", seconds=240)
    assert _warnings(workshop, job_id) == []
    metrics = {int(e["step"]): e["train_loss"] for e in _steps(workshop, job_id)}

    [file] = (tmp_path / "t").glob("wandb/offline-run-*/*.wandb")
    found = _read(READ_WANDB, path, file)
    assert {name: found["run"][name] for name in ("project", "id", "name", "tags")} == {
        "project": "banking", "id": job_id, "name": job_id, "tags": ["a"],
    }  # fmt: skip
    assert found["run"]["config"]["technique.r"] == 2
    assert {int(step): row["train_loss"] for step, row in found["steps"].items()} == pytest.approx(metrics)

    found = _read(READ_MLFLOW, path, MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true")
    assert (found["name"], found["status"], found["tags"]["tunery.job"]) == ("first", "FINISHED", job_id)
    assert found["params"]["technique.r"] == "2"
    assert {int(step): loss for step, loss in found["losses"].items()} == pytest.approx(metrics)
    assert {"scorecard_tuned_exact", "full_valid_loss"} <= found["metrics"].keys()

    workshop.slot_of(worker).kill()
    worker.kill()
    second = _submit(workshop, MLFLOW)
    workshop.start("train", PYTHONPATH=path, TUNERY_MLFLOW_TRACKING_URI="http://me:hidden@127.0.0.1:1", **own)
    workshop.until_state(second, "succeeded", seconds=240)
    [warning] = _warnings(workshop, second)
    assert warning.startswith("MLflow receives nothing from this run (")
    assert "hidden" not in warning


def _steps(workshop: Workshop, job_id: str) -> list[dict[str, Any]]:
    with workshop.session() as session:
        rows = session.scalars(select(Metric).where(Metric.job_id == job_id)).all()
        return [{"step": row.step, **row.values} for row in rows]
