"""A preference-tuning job, from pairs in storage to a model, its metrics and its result file."""

import json

import pytest
from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.datasets.model import File
from tunery.jobs.model import Checkpoint, Metric

OWN = ("rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy")


def pairs(count: int, first: int = 0) -> bytes:
    rows = [json.loads(line)["messages"] for line in training_rows(count, first=first).splitlines()]
    made = [{"prompt": row[:-1], "chosen": row[-1]["content"], "rejected": "no"} for row in rows]
    return b"".join(json.dumps(row).encode() + b"\n" for row in made)


@pytest.mark.slow
def test_a_job_learns_to_prefer(workshop: Workshop) -> None:
    workshop.start("io")
    workshop.start("train")
    contents = (pairs(12), pairs(4, first=100), training_rows(12), pairs(5, first=200))
    files = [workshop.file(content) for content in contents]
    asked = {"hyperparameters": {"n_epochs": 3, "batch_size": 6}, "learning_rate": 0.02}
    job_id = workshop.submit(*files[:2], files[3], method={"type": "dpo"}, **asked)
    wrong = [workshop.submit(files[0]), workshop.submit(files[2], method={"type": "dpo"})]

    job = workshop.until_state(job_id, "succeeded")

    assert job.plan
    assert job.plan["method"] == {"type": "dpo", "beta": 0.1, "loss": "sigmoid"}
    with workshop.session() as session:
        measured = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)).all()
        kept = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id)).all()
        result = session.get_one(File, job.result_file)
    steps = [metric.values for metric in measured]
    assert [name in steps[0] for name in (*(f"train_{name}" for name in OWN), "train_mean_token_accuracy")] == [
        True, True, True, True, False
    ]  # fmt: skip
    assert steps[-1]["train_loss"] < 0.9 * steps[0]["train_loss"]
    assert steps[-1]["train_rewards_margin"] > 0 == steps[0]["train_rewards_margin"]
    assert steps[-1]["full_valid_rewards_accuracy"] == 1
    assert all(checkpoint.metrics["full_valid_rewards_margin"] for checkpoint in kept)
    header, *lines = b"".join(workshop.storage.read(result.key)).decode().splitlines()
    assert header.endswith(f"valid_mean_token_accuracy,{','.join(f'{p}_{n}' for p in ('train', 'valid') for n in OWN)}")
    assert len(lines) == 6
    assert (job.scorecard or {})["metrics"]["preferred"]["tuned"] == 1
    (events,) = (line for line in workshop.story(job_id) if line.startswith("Scorecard on 5 test rows: preferred "))
    assert "exact match" not in events
    reasons = [workshop.until_state(id, "failed").error_message or "" for id in wrong]
    assert "this is a preference row (DPO)" in reasons[0]
    assert "Use the method 'dpo' (method.type)" in reasons[0]
    assert "Use the method 'supervised' (method.type) for rows with one answer." in reasons[1]
