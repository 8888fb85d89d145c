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
    """{count} of {examples} examples lose a part of their answer to the cut at {max_length} tokens: {lines}. Raise
    max_seq_length or shorten them; or send cut_answers: 'drop' to train without them, 'keep' to train what is left."""

    code = "answers_cut"


class DoesNotFit(JobFailure):
    """{what} needs about {needed} and the largest {device} here has {capacity}. {instead}"""

    code = "does_not_fit"


class CannotAdapt(JobFailure):
    """Adapters cannot be put on the base's layers so: {reason} Choose other target_modules or another technique."""

    code = "cannot_adapt"


class CannotQuantise(JobFailure):
    """The base cannot be kept in four bits: {reason} Use the technique 'lora', or another base."""

    code = "cannot_quantise"


class NotFinite(JobFailure):
    """The loss became {value} at step {step} and the run was stopped there. Lower the learning rate (it was {rate:g}),
    or look at the rows of that step in the job's log. {kept}"""

    code = "nan_loss"


class DiskFull(JobFailure):
    """The worker's disk is full: {what} could not be written. {kept} Its operator has to free space where the worker
    keeps its runs; a job with fewer keep_checkpoints needs less."""

    code = "disk_full"


class ArtifactDiffers(JobFailure):
    """The exported files do not answer as the trained model did: their logits are off by {difference:.2%} of their
    spread, and {tolerance:.2%} is allowed. Nothing was published. This is a fault of the server; its operator finds
    more in the job's log."""

    code = "artifact_differs"


class BenchmarkUnavailable(JobFailure):
    """The general benchmark 'lm_eval:{name}' cannot be measured: {reason}. Choose another evaluation.general.benchmark,
    or ask the operator to install the package lm-eval and what the task needs."""

    code = "benchmark_unavailable"


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
