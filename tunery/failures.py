"""Reasons for which a job fails. A class's docstring is the message that the job's owner reads.

The trainer and the workers raise these classes.
"""

from tunery.errors import TuneryError


class JobFailure(TuneryError):
    """The job failed."""

    code = "job_failed"

    @classmethod
    def quoted(cls, code: str, message: str, param: str | None) -> "JobFailure":
        """Rebuilds a failure that another process has reported, as the class that has its code."""
        kind = next((kind for kind in cls.__subclasses__() if kind.code == code), cls)
        return kind(param=param, message=message)


class InvalidTrainingFile(JobFailure):
    """The job failed due to an invalid {role} file. {reason}"""

    code = "invalid_training_file"


class InvalidNExamples(JobFailure):
    """{role} file has {n} example(s), but must have at least {least} examples"""

    code = "invalid_n_examples"


class AnswersCut(JobFailure):
    """{count} of {examples} examples lose part of their answer to the limit of {max_length} tokens: {lines}. Raise
    max_seq_length or shorten the examples; or set cut_answers to 'drop' to train without them, or to 'keep' to train on
    what is left."""

    code = "answers_cut"


class DoesNotFit(JobFailure):
    """{what} needs {needed}, but the largest {device} here has {capacity}. {instead}"""

    code = "does_not_fit"


class CannotAdapt(JobFailure):
    """The base's layers cannot take this adapter: {reason} {instead}"""

    code = "cannot_adapt"


class CannotQuantise(JobFailure):
    """The base cannot be quantised to four bits: {reason} Use the technique 'lora', or another base."""

    code = "cannot_quantise"


class NotFinite(JobFailure):
    """{what} at step {step}, so the run was stopped. Lower the learning rate (it was {rate:g}), or check the rows of
    that step, which are in the job's log. {kept}"""

    code = "nan_loss"


class DiskFull(JobFailure):
    """The worker's disk is full: {what} could not be written. {kept} Ask the operator to free disk space in the
    worker's runs directory, or lower keep_checkpoints."""

    code = "disk_full"


class ArtifactDiffers(JobFailure):
    """The exported files do not reproduce the trained model: their logits differ by {difference:.2%} of their spread,
    and at most {tolerance:.2%} is allowed. Nothing was published. This is a server error: ask the operator to read the
    job's log."""

    code = "artifact_differs"


class BenchmarkUnavailable(JobFailure):
    """The general benchmark 'lm_eval:{name}' cannot be run: {reason}. Choose another evaluation.general.benchmark,
    or ask the operator to install the package lm-eval and what the task needs."""

    code = "benchmark_unavailable"


class TrainingCrashed(JobFailure):
    """Training ended with an error: {reason} The job's log (`GET /v1/fine_tuning/jobs/{job}/logs`) has the details."""

    code = "training_crashed"


class ValidationBroke(JobFailure):
    """The job's files could not be checked: {reason}. This is a server error: ask the operator to read the I/O worker's
    log."""

    code = "validation_broke"


class ValidationLost(JobFailure):
    """The job's files could not be checked: the worker stopped {times} times before it had finished. Look for very
    large rows, or ask the operator to read the I/O worker's log."""

    code = "validation_lost"


class WorkerLost(JobFailure):
    """The job's worker was lost {times} time(s) {after}: its process or its host stopped without reporting an error.
    Ask the operator to check the host's memory and logs, then create the job again."""

    code = "worker_lost"
