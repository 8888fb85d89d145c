"""Why a request to a model is refused before the model server sees it."""

from tunery.errors import Rejected, TuneryError


class RateLimited(TuneryError):
    """This project has reached its limit of {limit} {unit} per minute. Try again in {seconds} s, or ask the operator
    for a higher limit. This request was not counted."""

    code = "rate_limit_exceeded"


class TooManyOpen(TuneryError):
    """This project has reached its limit of {limit} concurrent requests to models. Try again when one of them has
    ended. This request was not counted."""

    code = "rate_limit_exceeded"


class NothingCaptured(Rejected):
    """No captured request of '{id}' is suitable for this file. `GET /v1/models/{id}/capture` counts the rated and
    corrected ones; choose others with 'answers'."""

    code = "nothing_captured"
