"""Everything that can go wrong on purpose.

    TuneryError
    ├── Rejected                 the request asks for something that cannot be
    │   ├── InvalidValue         a field has a value it must not have
    │   ├── Unsupported          a field names something this server does not do
    │   ├── InvalidJSONL         an uploaded line is not a JSON object
    │   ├── CannotRender         a model's chat template cannot write the messages, or not so that they can be learned
    │   ├── PromptTooLong        a conversation fills the model's whole context
    │   ├── FileInUse            a live job needs the file
    │   ├── WrongState           the object's state forbids the deed
    │   ├── UnusableModel        a base model's files cannot be used
    │   ├── AddressRefused       a webhook URL leads where we do not post
    │   └── ReceiverSilent       a webhook's receiver gave no answer to a test
    ├── Unauthenticated          no key, or a wrong one
    ├── Forbidden                a right key that may not do this
    ├── NotFound                 no such object in this project
    │   └── ModelNotFound
    ├── RouteNotFound            no such route, or one this server refuses by design
    ├── MethodNotAllowed         a route, but not with this method
    ├── TooSlow                  a body that comes in too slowly
    ├── TooLarge                 more bytes than the limit
    ├── QuotaExceeded            the project has all it may have
    ├── Unavailable              a part of ours is down; try again
    │   ├── StorageFailed
    │   └── Overloaded           the model server's waiting line is full
    ├── JobFailure               why a job failed; its text is shown to the job's owner
    │   ├── InvalidTrainingFile
    │   ├── InvalidNExamples
    │   ├── DoesNotFit
    │   ├── CannotAdapt
    │   ├── NotFinite
    │   ├── ArtifactDiffers
    │   ├── TrainingCrashed
    │   ├── ValidationBroke
    │   ├── ValidationLost
    │   └── WorkerLost
    ├── LeaseLost                a late worker speaks for a job that is no longer its own
    ├── ChecksumMismatch         stored bytes are not the bytes that were recorded
    ├── ObjectMissing            storage has nothing under a key that a row names
    ├── KeyTaken                 storage already has something under a key that must be new
    └── IllegalMove              a job was asked to take an edge that is not in TRANSITIONS

A class's docstring is its message, with fields in braces; its `code` never changes. HTTP knows these classes in one
place only, the API's error handler.
"""

import inspect
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
    """{what} is not supported here. {instead}"""

    code = "unsupported"


class InvalidJSONL(Rejected):
    """Expected file to have JSONL format, where every line is a valid JSON dictionary. Line {line}: {reason}"""

    code = "invalid_jsonl"


class CannotRender(Rejected):
    """{reason}"""

    code = "cannot_render"


class PromptTooLong(Rejected):
    """This model's maximum context length is {limit} tokens, and your messages resulted in {tokens} tokens, which
    leaves no room for an answer. Please reduce the length of the messages."""

    code = "context_length_exceeded"


class FileInUse(Rejected):
    """File '{file}' is used by job '{job}', which has not ended. Cancel the job or wait for it, then
    delete the file."""

    code = "file_in_use"


class WrongState(Rejected):
    """{kind} '{id}' is {state}, so it cannot be {deed}. {instead}"""

    code = "wrong_state"


class UnusableModel(Rejected):
    """'{source}' cannot become a base model: {reason}"""

    code = "unusable_model"


class AddressRefused(Rejected):
    """Webhooks are not sent to {address}: {reason} Use an https URL with a public address, or ask the operator to name
    its network in TUNERY_WEBHOOK_ALLOW."""

    code = "address_refused"


class ReceiverSilent(Rejected):
    """The receiver gave no HTTP answer: {reason}. Start it, or correct the endpoint's url, then test again."""

    code = "receiver_silent"


class Unauthenticated(TuneryError):
    """{reason} Send a project's key as 'Authorization: Bearer <key>'; `tunery keys create` makes one."""

    code = "invalid_api_key"


class Forbidden(TuneryError):
    """This key may not {deed}. Use an administrator's key (`tunery keys create --admin`)."""

    code = "forbidden"


class NotFound(TuneryError):
    """No {kind} '{id}' in this project. Check the id and the key's project."""

    code = "not_found"


class ModelNotFound(NotFound):
    """The model '{id}' does not exist or this project has no access to it. `GET /v1/models` lists what there is; an
    administrator adds a base with `tunery models add`."""

    code = "model_not_found"


class RouteNotFound(TuneryError):
    """{what}"""

    code = "not_found"


class MethodNotAllowed(TuneryError):
    """Invalid method for URL ({route}). Use {allowed}."""

    code = "method_not_allowed"


class TooSlow(TuneryError):
    """The request's body came too slowly: {seen} bytes so far. Send it again, over a faster line or in smaller
    parts."""

    code = "request_timeout"


class TooLarge(TuneryError):
    """{what} has more than {limit} bytes, which is the limit here. {instead}"""

    code = "too_large"


class QuotaExceeded(TuneryError):
    """{what} Wait until one has ended, or ask the operator to raise the project's limit."""

    code = "insufficient_quota"


class Unavailable(TuneryError):
    """{part} does not answer. Nothing was lost; try again in a few seconds."""

    code = "unavailable"


class StorageFailed(Unavailable):
    """Object storage could not {deed} ({reason}). Nothing stored before was lost; look at the storage's health and free
    space, then try again."""

    code = "storage_failed"


class Overloaded(Unavailable):
    """{waiting} requests wait for the model server already, which answers one at a time. Nothing was lost; try again in
    a few seconds."""

    code = "overloaded"


class JobFailure(TuneryError):
    """The job failed."""

    code = "job_failed"

    @classmethod
    def quoted(cls, code: str, message: str, param: str | None) -> "JobFailure":
        """Returns the failure that another process has reported, as the class that has its code."""
        kind = next((kind for kind in cls.__subclasses__() if kind.code == code), cls)
        return kind(param=param, message=message)


class InvalidTrainingFile(JobFailure):
    """The job failed due to an invalid {role} file. {reason}"""

    code = "invalid_training_file"


class InvalidNExamples(JobFailure):
    """{role} file has {n} example(s), but must have at least {least} examples"""

    code = "invalid_n_examples"


class DoesNotFit(JobFailure):
    """{what} needs about {needed} and the largest {device} here has {capacity}. {instead}"""

    code = "does_not_fit"


class CannotAdapt(JobFailure):
    """Adapters cannot be put on the base's layers so: {reason} Choose other target_modules or another technique."""

    code = "cannot_adapt"


class NotFinite(JobFailure):
    """The loss became {value} at step {step} and the run was stopped there. Lower the learning rate (it was {rate:g}),
    or look at the rows of that step in the job's log."""

    code = "nan_loss"


class ArtifactDiffers(JobFailure):
    """The exported files do not answer as the trained model did: their logits are off by {difference:.2%} of their
    spread, and {tolerance:.2%} is allowed. Nothing was published. This is a fault of the server; its operator finds
    more in the job's log."""

    code = "artifact_differs"


class TrainingCrashed(JobFailure):
    """Training ended with an error: {reason} The job's log (`GET /v1/fine_tuning/jobs/{job}/logs`) has the whole
    story."""

    code = "training_crashed"


class ValidationBroke(JobFailure):
    """The job's files could not be checked: {reason}. This is a fault of the server; its operator finds more in the
    log of the worker for I/O."""

    code = "validation_broke"


class ValidationLost(JobFailure):
    """The job's files could not be checked: the worker that checked them ended {times} times before it was done. Look
    for rows that are very large; the server's operator finds more in the log of the worker for I/O."""

    code = "validation_lost"


class WorkerLost(JobFailure):
    """The job's worker was lost {times} time(s) {after}: its process, or its host, ended without a word. Look at the
    host's memory and its log, then create the job again."""

    code = "worker_lost"


class LeaseLost(TuneryError):
    """Attempt {attempt} of job '{job}' is over: another hand moved the job on. Nothing was written."""

    code = "lease_lost"


class ChecksumMismatch(TuneryError):
    """'{key}' does not have the recorded sha256 ({expected}, found {found}). Restore it from a good copy."""

    code = "checksum_mismatch"


class ObjectMissing(TuneryError):
    """'{key}' is not in storage. Restore it from a copy, or delete what refers to it."""

    code = "object_missing"


class KeyTaken(TuneryError):
    """'{key}' is stored already and is not replaced."""

    code = "key_taken"


class IllegalMove(TuneryError):
    """A job cannot go from {source} to {target}."""

    code = "illegal_move"
