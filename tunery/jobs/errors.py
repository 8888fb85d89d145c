"""What can be wrong with jobs and their attempts."""

from tunery.errors import NotFound, TuneryError


class QuotaExceeded(TuneryError):
    """{what} Wait until one has ended, or ask the operator to raise the project's limit."""

    code = "insufficient_quota"


class NoScorecard(NotFound):
    """Job '{id}' has no scorecard: it named no evaluation.test_file, or has not been measured yet."""


class LeaseLost(TuneryError):
    """Attempt {attempt} of job '{job}' is over: another hand moved the job on. Nothing was written."""

    code = "lease_lost"


class IllegalMove(TuneryError):
    """A job cannot go from {source} to {target}."""

    code = "illegal_move"
