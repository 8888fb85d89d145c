"""Errors about jobs and their attempts."""

from tunery.errors import NotFound, Rejected, TuneryError


class QuotaExceeded(TuneryError):
    """{what} Wait until one has ended, or ask the operator to raise the project's limit."""

    code = "insufficient_quota"


class NoScorecard(NotFound):
    """Job '{id}' has no scorecard: either it has no evaluation.test_file, or it has not been evaluated yet."""


class NoReproduction(NotFound):
    """Job '{id}' is not a rerun, so there is nothing to compare it with. `POST /v1/fine_tuning/jobs/{id}/rerun` creates
    a rerun of it."""


class InputGone(NotFound):
    """The {kind} '{id}' of job '{job}' has been deleted. Name another one as '{field}' to run the job with that."""


class InputChanged(Rejected):
    """The {kind} '{id}' has changed since job '{job}' ran: its sha256 was {then} and is now {now}. Name another one as
    '{field}', or create a new job."""

    code = "input_changed"


class ExceedsInventory(Rejected):
    """{reason}"""

    code = "does_not_fit"


class LeaseLost(TuneryError):
    """Attempt {attempt} of job '{job}' is over: the job has changed state or belongs to another worker. Nothing was
    written."""

    code = "lease_lost"


class IllegalMove(TuneryError):
    """A job cannot go from {source} to {target}."""

    code = "illegal_move"
