"""Jobs that go on from what earlier ones made, through real workers and a real trainer."""

from typing import Any

import pytest
from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.jobs.model import Metric


def _losses(workshop: Workshop, job_id: str) -> list[float]:
    with workshop.session() as session:
        measured = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)).all()
    return [float(metric.values["train_loss"]) for metric in measured]


@pytest.mark.slow
@pytest.mark.parametrize("technique", [{"type": "full"}, {"type": "qlora", "r": 4}], ids=["full", "qlora"])
def test_a_job_goes_on_from_what_another_made(workshop: Workshop, technique: dict[str, Any]) -> None:
    """At a rate too small to learn by: its losses are those that the other one ended with, not those it began with."""
    workshop.start("io")
    workshop.start("train")
    training = workshop.file(training_rows(12))
    asked = {"technique": technique, "hyperparameters": {"n_epochs": 30, "batch_size": 12}, "learning_rate": 1e-2}
    first = workshop.until_state(workshop.submit(training, **asked), "succeeded")
    workshop.parent_model = first.tuned_model

    asked |= {"hyperparameters": {"n_epochs": 2, "batch_size": 12}, "learning_rate": 1e-9}
    second = workshop.until_state(workshop.submit(training, **asked), "succeeded")

    before, after = _losses(workshop, first.id), _losses(workshop, second.id)
    assert before[-1] < 0.7 * before[0]
    assert after == pytest.approx([before[-1]] * 2, rel=0.2)
    assert second.tuned_model != first.tuned_model
