"""Errors that only the trainer can find in a job: its owner reads through the API what to change.

`test_bad_input.py` has those that are found before the job holds a device.
"""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from workshop import ROOT, Workshop, training_rows

JOBS = "/v1/fine_tuning/jobs"
FULL_DISK = {"TUNERY_PLUGINS": "full_disk", "PYTHONPATH": str(ROOT / "tests/fixtures")}


def _create(workshop: Workshop, client: TestClient, **asked: Any) -> str:
    file = workshop.file(training_rows(12))
    same = {"model": "tiny", "training_file": file, "seed": 1, "max_seq_length": 128}
    made = client.post(JOBS, json={**same, "hyperparameters": {"n_epochs": 4, "batch_size": 6}, **asked})
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


@pytest.mark.slow
def test_target_module_that_does_not_exist_is_named(workshop: Workshop, client: TestClient) -> None:
    workshop.start("io")
    workshop.start("train")
    job_id = _create(workshop, client, technique={"type": "lora", "r": 2, "target_modules": ["no_such_proj"]})

    workshop.until_state(job_id, "failed")

    error = client.get(f"{JOBS}/{job_id}").json()["error"]
    assert error["code"] == "cannot_adapt"
    assert "no_such_proj" in error["message"]
    assert "Choose other target_modules" in error["message"]
    assert len(workshop.attempts(job_id)) == 1, "it was not tried again"


@pytest.mark.slow
def test_disk_that_fills_in_a_checkpoint_is_reported_and_the_last_good_one_stays(
    workshop: Workshop, client: TestClient
) -> None:
    workshop.start("io")
    workshop.start("train", **FULL_DISK)
    job_id = _create(workshop, client, technique={"type": "lora", "r": 4}, keep_checkpoints=3)

    def reported() -> list[str]:
        events = client.get(f"{JOBS}/{job_id}/events", params={"limit": 100}).json()["data"]
        return [event["message"] for event in events if "The worker's disk is full" in event["message"]]

    message = workshop.until(reported, "the event of the full disk")[-1]

    assert "checkpoints/step-6 could not be written. The state of step 4 is intact and is kept." in message
    assert "or lower keep_checkpoints" in message
    kept = client.get(f"{JOBS}/{job_id}/checkpoints").json()["data"]
    assert [checkpoint["step_number"] for checkpoint in kept] == [4, 2]
