"""What can go wrong on purpose: the root of the tree, and what several parts of the floor raise.

The others stand in `errors.py` beside what raises them, and why jobs fail in `tunery/failures.py`:

    TuneryError
    ├── Rejected                 the request asks for something that cannot be
    │   ├── InvalidValue         a field has a value it must not have
    │   ├── Unsupported          a field names something this server does not do
    │   ├── WrongState           the object's state forbids the operation
    │   ├── UnusableModel        a base model's files cannot be used
    │   ├── InvalidRows          rows: an uploaded file cannot be read as the format that it begins as
    │   │   ├── InvalidJSONL     an uploaded line is not a JSON object
    │   │   └── NoTrainingRows   datasets: none of a file's first rows can be trained
    │   ├── CannotRender         rows: a chat template cannot write the messages, or not so that they can be learned
    │   ├── PromptTooLong        rows: a conversation fills the model's whole context
    │   ├── FileInUse            datasets: a live job needs the file
    │   ├── NoReport             datasets: a file of another purpose has no report
    │   ├── CannotHoldOut        datasets: a cleaned file's rows are too alike to be split
    │   ├── NothingLeft          datasets: a cleaning drops every row
    │   ├── InputChanged         jobs: a job that is to run again would read something else
    │   ├── ExceedsInventory     jobs: no device here has the least memory that a job needs
    │   ├── EndpointRefused      baselines: an external endpoint is where we do not ask
    │   ├── NothingCaptured      traffic: no captured request is suitable for a file
    │   ├── AddressRefused       webhooks: a URL leads where we do not post
    │   └── ReceiverSilent       webhooks: a receiver gave no answer to a test
    ├── Unauthenticated          keys: no key, or a wrong one
    ├── Forbidden                keys: a right key that may not do this
    ├── NotFound                 no such object in this project
    │   ├── ModelNotFound        models
    │   │   └── ModelWithheld    models: the gate of its job keeps it from use
    │   ├── NoScorecard          jobs: a job was not measured, so there is nothing to show
    │   ├── NoReproduction       jobs: a job runs no other one again, so there is nothing to compare it with
    │   └── InputGone            jobs: a job that is to run again read something that was deleted
    ├── RouteNotFound            api/request_errors.py: no such route, or one this server refuses by design
    ├── MethodNotAllowed         api/request_errors.py: a route, but not with this method
    ├── TooSlow                  api/request_errors.py: a body that comes in too slowly
    ├── TooLarge                 more bytes than the limit
    ├── QuotaExceeded            jobs: the project has all it may have
    ├── RateLimited              traffic: the project's requests or tokens of a minute are used up
    ├── TooManyOpen              traffic: the project has as many requests to models open as it may have
    ├── PluginFailed             a module of TUNERY_PLUGINS cannot be imported
    ├── Unavailable              a part of ours is down; try again
    │   ├── StorageFailed        storage
    │   ├── Overloaded           the model server's waiting line is full
    │   └── AnswerTooSlow        the model server: an answer that takes too long
    ├── JobFailure               failures: why a job failed
    │   ├── InvalidTrainingFile
    │   ├── InvalidNExamples
    │   ├── AnswersCut
    │   ├── DoesNotFit
    │   ├── CannotAdapt
    │   ├── CannotQuantise
    │   ├── DiskFull
    │   ├── NotFinite
    │   ├── ArtifactDiffers
    │   ├── BenchmarkUnavailable
    │   ├── TrainingCrashed
    │   ├── ValidationBroke
    │   ├── ValidationLost
    │   └── WorkerLost
    ├── LeaseLost                jobs: a late worker writes to a job that is no longer its own
    ├── IllegalMove              jobs: a job was asked to take an edge that is not in TRANSITIONS
    ├── ChecksumMismatch         storage: stored bytes are not the bytes that were recorded
    ├── ObjectMissing            storage: there is nothing under a key that a row names
    ├── KeyTaken                 storage: there is something under a key that must be new
    ├── ProjectBusy              retention: a project that is to be erased has runs that have not ended
    └── WrongStorage             retention: a project that is to be erased has its bytes elsewhere

A class's docstring is its message, with fields in braces; its `code` never changes. HTTP knows these classes in one
place only, the API's error handler.
"""

import inspect
from functools import partial
from typing import Any, ClassVar


class TuneryError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "server_error"

    def __init__(self, *, param: str | None = None, message: str | None = None, **fields: Any) -> None:
        """`param` names the request's field at fault; `fields` fill the braces of the class's docstring.

        `message` replaces the docstring where another process has filled it already.
        """
        self.param = param
        self.fields = fields
        if message is None:
            message = inspect.cleandoc(type(self).__doc__ or "").replace("\n", " ").format(**fields)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions are pickled by their positional arguments, and these have none."""
        return partial(type(self), param=self.param, message=str(self), **self.fields), ()

    @property
    def message(self) -> str:
        return str(self)


class Rejected(TuneryError):
    """The request cannot be carried out."""

    code = "invalid_request"


class InvalidValue(Rejected):
    """{reason}"""

    code = "invalid_value"


class Unsupported(Rejected):
    """{what} is not supported. {instead}"""

    code = "unsupported"


class WrongState(Rejected):
    """{kind} '{id}' is {state}, so it cannot be {action}. {instead}"""

    code = "wrong_state"


class UnusableModel(Rejected):
    """'{source}' cannot be used as a base model: {reason}"""

    code = "unusable_model"


class NotFound(TuneryError):
    """No {kind} '{id}' in this project. Check the id and the key's project."""

    code = "not_found"


class TooLarge(TuneryError):
    """{what} is larger than the limit of {limit} bytes. {instead}"""

    code = "too_large"


class PluginFailed(TuneryError):
    """The plug-in '{name}' cannot be imported ({reason}). Install it for every service, or remove it from
    TUNERY_PLUGINS."""

    code = "plugin_failed"


class Unavailable(TuneryError):
    """{part} does not answer. Nothing was lost; try again in a few seconds."""

    code = "unavailable"


class Overloaded(Unavailable):
    """The model server's queue is full ({waiting} requests). Nothing was lost; try again in a few seconds."""

    code = "overloaded"


class AnswerTooSlow(Unavailable):
    """The answer was not complete after {seconds:g} seconds, the model server's time limit. Lower
    'max_completion_tokens', or stream the answer to keep what was generated."""

    code = "answer_too_slow"
