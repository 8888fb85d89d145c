"""Compares the learning rate of each step with literals."""

import pytest
from run_folders import plan

from tunery.spec import Schedule
from worker.trainer.loop import learning_rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule(type="linear", warmup_ratio=0.2), [0.5, 1.0, 0.75, 0.5, 0.25]),
        (Schedule(type="linear", warmup_ratio=0.2, min_ratio=0.1), [0.5, 1.0, 0.7, 0.4, 0.1]),
        (Schedule(type="cosine", warmup_ratio=0.2), [0.5, 1.0, 0.853553, 0.5, 0.146447]),
        (Schedule(type="cosine", warmup_ratio=0.2, min_ratio=0.1), [0.5, 1.0, 0.775, 0.325, 0.1]),
        (Schedule(type="constant", warmup_ratio=0.4, min_ratio=0.1), [1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        (Schedule(type="linear", warmup_ratio=1.0, min_ratio=0.1), [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]),
    ],
)
def test_schedule_ends_at_its_least_rate(schedule: Schedule, rates: list[float]) -> None:
    settled = plan(schedule=schedule, learning_rate=1.0)

    assert [learning_rate(settled, step, 5) for step in range(1, 6)] == pytest.approx(rates, abs=1e-6)


def test_a_run_of_one_step_takes_it_at_the_full_rate() -> None:
    settled = plan(schedule=Schedule(min_ratio=0.1), learning_rate=1.0)

    assert learning_rate(settled, 1, 1) == 1.0
