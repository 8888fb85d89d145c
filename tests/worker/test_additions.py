"""A developer's additions work in real jobs without other changes: a format of rows, a method, a training option.

tests/api/test_backends.py adds a back end of the model server.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from releases import Release
from sqlalchemy import select
from workshop import ROOT, Workshop, training_rows

from api.main import create_app
from tunery import spec
from tunery.jobs.model import Metric
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.rows import encoding, readers

PLUGIN = {"TUNERY_PLUGINS": "toy_format", "PYTHONPATH": str(ROOT / "tests/fixtures")}
OPTION = '    rate_factor: Float = Field(1.0, ge=0, description="A toy: multiplies the rate of every step")\n'


def key_of(workshop: Workshop) -> str:
    with workshop.session() as session:
        return auth.create_key(session, session.get_one(Project, workshop.project_id), "test")[1]


def metrics(workshop: Workshop, job_id: str, name: str) -> list[float]:
    with workshop.session() as session:
        measured = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step))
        return [metric.values[name] for metric in measured]


@pytest.fixture
def client(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Returns a client of the API with the plug-in, which is unregistered after the test."""
    monkeypatch.setattr(readers, "FORMATS", dict(readers.FORMATS))
    monkeypatch.delitem(sys.modules, "toy_format", raising=False)
    app = create_app(workshop.database.settings.model_copy(update={"plugins": ("toy_format",)}))
    return TestClient(app, headers={"authorization": f"Bearer {key_of(workshop)}"})


@pytest.mark.slow
def test_a_job_trains_on_a_plug_ins_format(workshop: Workshop, client: TestClient) -> None:
    workshop.start("io", **PLUGIN)
    workshop.start("train", **PLUGIN)
    cards = "".join(f"Q: What comes after {n}?\nA: {n + 1}\n" for n in range(12))
    wrong = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": cards + "Q: And then?\n"})
    assert "cards format. Row 13: has no line 'A: '." in wrong.json()["error"]["message"]
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": cards}).json()["id"]
    job = workshop.submit(file, learning_rate=0.01, hyperparameters={"n_epochs": 3, "batch_size": 12})

    workshop.until_state(job, "succeeded")

    losses = metrics(workshop, job, "train_loss")
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True), losses


PAIRWISE = {**PLUGIN, "TUNERY_PLUGINS": "toy_pairwise.rows,toy_pairwise"}


@pytest.fixture
def pairwise_client(workshop: Workshop) -> Iterator[TestClient]:
    """Yields a client of the API with the method's plug-in, which is unregistered after the test."""
    names = ("toy_pairwise.rows", "toy_pairwise")
    app = create_app(workshop.database.settings.model_copy(update={"plugins": names}))
    yield TestClient(app, headers={"authorization": f"Bearer {key_of(workshop)}"})
    for known in (spec.METHODS, encoding.ENCODERS):
        known.pop("pairwise", None)
    for name in names:
        del sys.modules[name]


def pairs(count: int) -> bytes:
    rows = [json.loads(line) for line in training_rows(count).splitlines()]
    return b"".join(json.dumps({**row, "other": "0"}).encode() + b"\n" for row in rows)


@pytest.mark.slow
def test_a_job_trains_by_a_plug_ins_method(workshop: Workshop, pairwise_client: TestClient) -> None:
    """The method has two rows an example and its own validation loss; the job runs from the request to the artifact."""
    workshop.start("io", **PAIRWISE)
    workshop.start("train", **PAIRWISE)
    sent = [("file", ("pairs.jsonl", content)) for content in (pairs(12), pairs(4), training_rows(12))]
    files = [
        pairwise_client.post("/v1/files", data={"purpose": "fine-tune"}, files=[file]).json()["id"] for file in sent
    ]
    own = {"margin": 2, "n_epochs": 6, "batch_size": 12}
    method = {"type": "pairwise", "pairwise": {"hyperparameters": own}}
    body = {"model": "tiny", "method": method, "technique": {"type": "lora", "r": 2}, "learning_rate": 0.02, "seed": 1}
    made = [
        pairwise_client.post("/v1/fine_tuning/jobs", json={**body, **named}).json()
        for named in (
            {
                "training_file": files[0],
                "validation_file": files[1],
                "evaluation": {"test_file": files[2], "max_rows": 2, "max_new_tokens": 2},
            },
            {"training_file": files[2]},
        )
    ]

    workshop.until_state(made[0]["id"], "succeeded", seconds=180)
    workshop.until_state(made[1]["id"], "failed")

    job = pairwise_client.get(f"/v1/fine_tuning/jobs/{made[0]['id']}").json()
    knobs = {"learning_rate_multiplier": job["hyperparameters"]["learning_rate_multiplier"], **own}
    assert job["method"] == {"type": "pairwise", "pairwise": {"hyperparameters": knobs}}
    assert job["fine_tuned_model"]
    assert job["scorecard"]["rows"] == 2  # the test file has chats, whatever the method
    losses = metrics(workshop, job["id"], "train_loss")
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0], losses
    error = pairwise_client.get(f"/v1/fine_tuning/jobs/{made[1]['id']}").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "Field required" in error["message"]


CREATE = """
import json, sys
from fastapi.testclient import TestClient
from api.main import create_app

key, body = json.loads(sys.argv[1])
http = TestClient(create_app(), headers={"authorization": f"Bearer {key}"})
print(json.dumps(http.post("/v1/fine_tuning/jobs", json=body).json()))
"""


@pytest.mark.slow
def test_a_new_option_changes_a_run(workshop: Workshop, tmp_path: Path) -> None:
    """Two more lines suffice: the option, and the place where the trainer reads it. A tiny rate learns nothing."""
    release = Release.copy(tmp_path / "next")
    release.change("tunery/spec.py", "class TrainingOptions(", "    packing: bool", OPTION + "    packing: bool")
    release.change(
        "worker/trainer/loop.py",
        "def _take_step",
        "rate = learning_rate(",
        "rate = t.plan.rate_factor * learning_rate(",
    )
    file = workshop.file(training_rows(12))
    made = {"model": "tiny", "training_file": file, "technique": {"type": "lora", "r": 2}, "learning_rate": 0.01}
    body = {**made, "hyperparameters": {"n_epochs": 3, "batch_size": 12}, "rate_factor": 1e-6, "seed": 1}
    job = release.ask(CREATE, key_of(workshop), body)
    assert job["rate_factor"] == 1e-6, job
    workshop.start("io", tree=release.folder)
    workshop.start("train", tree=release.folder)

    workshop.until_state(job["id"], "succeeded")

    losses = metrics(workshop, job["id"], "train_loss")
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-3, losses
