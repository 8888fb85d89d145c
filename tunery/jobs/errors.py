"""What can be wrong with jobs and their attempts."""

from tunery.errors import NotFound, Rejected, TuneryError


class QuotaExceeded(TuneryError):
    """{what} Wait until one has ended, or ask the operator to raise the project's limit."""

    code = "insufficient_quota"


class NoScorecard(NotFound):
    """Job '{id}' has no scorecard: it named no evaluation.test_file, or has not been measured yet."""


class NoReproduction(NotFound):
    """Job '{id}' runs no other one again, so there is nothing to compare it with.
    `POST /v1/fine_tuning/jobs/{id}/rerun` makes a job that does."""


class InputGone(NotFound):
    """The {kind} '{id}', with which job '{job}' ran, was deleted. Send another as '{field}' to run the job on that."""


class InputChanged(Rejected):
    """The {kind} '{id}' is not what job '{job}' ran with: its sha256 was {then} and is {now}. Send another as
    '{field}', or create a new job."""

    code = "input_changed"


class ExceedsInventory(Rejected):
    """{reason}"""

    code = "does_not_fit"


class LeaseLost(TuneryError):
    """Attempt {attempt} of job '{job}' is over: another hand moved the job on. Nothing was written."""

    code = "lease_lost"


class IllegalMove(TuneryError):
    """A job cannot go from {source} to {target}."""

    code = "illegal_move"
