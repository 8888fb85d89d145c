"""Expected errors: the root of the tree, and the classes that several parts of the base raise.

The others are in the `errors.py` beside what raises them, and the reasons of failed jobs in `tunery/failures.py`:

    TuneryError
    ├── Rejected                 the request cannot be carried out
    │   ├── InvalidValue         a field has an invalid value
    │   ├── Unsupported          a field names something that this server does not support
    │   ├── WrongState           the object's state forbids the operation
    │   ├── UnusableModel        a base model's files cannot be used
    │   ├── InvalidRows          rows: an uploaded file is not valid in its format
    │   │   ├── InvalidTable     a line of an uploaded table is not valid
    │   │   ├── InvalidJSONL     an uploaded line is not a JSON object
    │   │   └── NoTrainingRows   datasets: none of a file's first rows can be used for training
    │   ├── CannotRender         rows: a chat template cannot render the messages, or not so that they can be learned
    │   ├── PromptTooLong        rows: a conversation fills the model's whole context
    │   ├── FileInUse            datasets: an unfinished job needs the file
    │   ├── NoReport             datasets: a file with another purpose has no report
    │   ├── NothingToCompare     datasets: no row of the file that leaks are looked for in can be read
    │   ├── CannotHoldOut        datasets: a cleaned file's rows are too similar to be split
    │   ├── NothingLeft          datasets: a cleaning drops every row
    │   ├── InputChanged         jobs: an input of a rerun has changed
    │   ├── ExceedsInventory     jobs: no device here has a job's minimum memory
    │   ├── EndpointRefused      baselines: an external endpoint has an address that is not allowed
    │   ├── NothingCaptured      traffic: no captured request is suitable for a file
    │   ├── AddressRefused       webhooks: a URL has an address that is not allowed
    │   └── ReceiverSilent       webhooks: a receiver did not respond to a test
    ├── Unauthenticated          keys: no key, or an invalid one
    ├── Forbidden                keys: a valid key without the permission
    ├── NotFound                 no such object in this project
    │   ├── ModelNotFound        models
    │   │   └── ModelWithheld    models: the gate of its job, or the check of the served model, withholds it
    │   ├── NoScorecard          jobs: a job has not been evaluated
    │   ├── NoReproduction       jobs: a job is not a rerun, so there is nothing to compare it with
    │   └── InputGone            jobs: an input of a rerun has been deleted
    ├── RouteNotFound            api/request_errors.py: no such route, or one that this server does not support
    ├── MethodNotAllowed         api/request_errors.py: a route that does not have this method
    ├── TooSlow                  api/request_errors.py: a body that arrives too slowly
    ├── TooLarge                 more bytes than the limit
    ├── QuotaExceeded            jobs: the project has reached a limit
    ├── RateLimited              traffic: the project has reached its limit of requests or tokens per minute
    ├── TooManyOpen              traffic: the project has reached its limit of concurrent requests
    ├── PluginFailed             a module of TUNERY_PLUGINS cannot be imported
    ├── WrongSettings            variables of the environment have invalid values
    ├── Unavailable              a part of the service is down; try again
    │   ├── StorageFailed        storage
    │   │   └── StorageRefused   storage: it will not serve us before a setting is changed
    │   ├── NotMigrated          the database has the tables of another release
    │   ├── Overloaded           the model server's queue is full
    │   └── AnswerTooSlow        the model server: an answer takes too long
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
    ├── LeaseLost                jobs: a worker writes to a job that it has lost
    ├── IllegalMove              jobs: a state change that is not in TRANSITIONS
    ├── ChecksumMismatch         storage: stored bytes do not have the recorded checksum
    ├── ObjectMissing            storage: there is no object under a recorded key
    ├── KeyTaken                 storage: there is already an object under a new key
    ├── ProjectBusy              retention: a project to be erased has unfinished runs
    └── WrongStorage             retention: a project to be erased has its objects in another storage

A class's docstring is its message, with fields in braces; its `code` never changes. Only the API's error handler
maps these classes to HTTP.
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


class WrongSettings(TuneryError):
    """{lines}"""

    code = "wrong_settings"


class Unavailable(TuneryError):
    """{part} does not answer. Nothing was lost; try again in a few seconds."""

    code = "unavailable"


class NotMigrated(Unavailable):
    """The database does not have the tables of this release ({reason}). The operator has to run `alembic upgrade head`
    with this release; what waits then goes on."""

    code = "not_migrated"


class Overloaded(Unavailable):
    """The model server's queue is full ({waiting} requests). Nothing was lost; try again in a few seconds."""

    code = "overloaded"


class AnswerTooSlow(Unavailable):
    """The answer was not complete after {seconds:g} seconds, the model server's time limit. Lower
    'max_completion_tokens', or stream the answer to keep what was generated."""

    code = "answer_too_slow"
