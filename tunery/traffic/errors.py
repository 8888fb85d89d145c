"""Why a request to a model is refused before the model server sees it."""

from tunery.errors import Rejected, TuneryError


class RateLimited(TuneryError):
    """This project's limit of {limit} {unit} a minute is reached. Send the request again in {seconds} s, or ask the
    operator for a higher limit. Nothing was counted."""

    code = "rate_limit_exceeded"


class TooManyOpen(TuneryError):
    """This project has {limit} requests to models open, which is the limit. Send the request again when one of them
    has ended. Nothing was counted."""

    code = "rate_limit_exceeded"


class NothingCaptured(Rejected):
    """No captured request of '{id}' belongs into such a file. `GET /v1/models/{{id}}/capture` counts those that were
    rated or corrected; name others in 'answers'."""

    code = "nothing_captured"
