"""A job that replays rows of a user's file, through validation and a worker."""

import pytest
from workshop import Workshop, training_rows

from worker.io import validation


def test_a_fault_in_the_file_of_general_rows_fails_the_job_and_names_the_line(workshop: Workshop) -> None:
    general = workshop.file(training_rows(2) + b'{"messages": []}\n')
    job_id = workshop.submit(workshop.file(training_rows(12)), replay={"source": general})
    assert validation.validate_next(workshop.settings, workshop.storage)
    job = workshop.job(job_id)
    assert (job.state, job.error_code, job.error_param) == ("failed", "invalid_training_file", "replay_file")
    assert "invalid replay file" in str(job.error_message)
    assert "Example 3" in str(job.error_message)


def test_a_job_waits_for_its_file_of_general_rows_to_be_read(workshop: Workshop) -> None:
    general = workshop.file(training_rows(2), checked=False)
    job_id = workshop.submit(workshop.file(training_rows(12)), replay={"source": general})
    assert not validation.validate_next(workshop.settings, workshop.storage)
    assert workshop.job(job_id).state == "validating_files"


@pytest.mark.slow
def test_a_job_replays_a_file_and_says_so(workshop: Workshop) -> None:
    workshop.start("io")
    workshop.start("train")
    general = workshop.file(training_rows(6, first=200))
    job_id = workshop.submit(workshop.file(training_rows(12)), replay={"source": general, "share": 0.2})
    job = workshop.until_state(job_id, "succeeded")
    assert (job.step, job.total_steps) == (6, 6)
    assert f"Replay of 3 of 6 rows of {general}: 3 an epoch, 20.0% of its rows" in workshop.story(job_id)
    assert not [line for line in workshop.story(job_id) if "too good" in line]
