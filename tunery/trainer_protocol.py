"""The messages of a trainer: one JSON object a line on its standard output. Its standard error is the job's log.

The supervisor records each message. Losses are means over labelled tokens, in nats; times are seconds.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Message(BaseModel):
    # A NaN must arrive as such, to be reported. JSON has none, hence the strings "NaN" and "Infinity".
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Phase(Message):
    """The trainer's present phase: a word for people (`loading`, `training`, `evaluating`, `saving`, `exporting`).

    `seconds_left`: to the end of the run, where that is known.
    """

    type: Literal["phase"] = "phase"
    phase: str
    seconds_left: float | None = None


class Replayed(Message):
    """The general rows beside the task's."""

    source: str = Field(description="`self`, or a file's id")
    prompts: int = Field(description="Prompts that the base was asked; for a file, its rows")
    ended: int = Field(description="Answers that ended within the limit and can be used for training")
    rows: int = Field(description="Rows that the run uses, each at most once per epoch")
    rows_an_epoch: int
    share: float = Field(description="Fraction of an epoch's rows")


class Started(Message):
    """The model is loaded and the rows are tokenised; the next thing is step `first_step`."""

    type: Literal["started"] = "started"
    trainable_params: int
    all_params: int
    total_steps: int
    first_step: int = Field(description="1, or the step after the resumed snapshot")
    examples: int = Field(description="Examples of the training file per epoch, without replay")
    train_tokens: int = Field(description="Tokens of one epoch, after truncation")
    truncated_examples: int = 0
    device: str
    learning_share: float | None = Field(
        None, description="Fraction of the base's linear weights that are trained or have adapters"
    )
    quantised_share: float | None = Field(None, description="Fraction of them in four bits, if the base is quantised")
    replay: Replayed | None = None
    warnings: list[str] = []


class Step(Message):
    """One optimizer step."""

    type: Literal["step"] = "step"
    step: int
    epoch: float
    train_loss: float
    train_accuracy: float | None = Field(
        description="Fraction of labelled tokens whose most likely prediction is correct; None if the method has none"
    )
    train_metrics: dict[str, float] = Field({}, description="Further metrics of the method, by name")
    learning_rate: float
    grad_norm: float
    tokens: int = Field(description="All tokens trained on so far, padding excluded")
    seconds: float = Field(description="Duration of this step")
    seconds_left: float | None = Field(
        None, description="Estimated time to the end of the run, including evaluations and files"
    )
    valid_loss: float | None = Field(None, description="Loss on one small batch of the validation file")
    valid_accuracy: float | None = None
    valid_metrics: dict[str, float] = {}


class Evaluated(Message):
    """The whole validation file, and the task's score on a sample of it where that was asked for."""

    type: Literal["evaluated"] = "evaluated"
    step: int
    loss: float
    accuracy: float | None
    metrics: dict[str, float] = {}
    task_metric: str | None = Field(None, description="The metric of `task_score`: the primary metric of the task")
    task_score: float | None = Field(None, description="Score from 0 to 1 on `task_rows` validation rows")
    task_rows: int = 0
    samples: list[dict[str, Any]] = Field(
        default=[], description="Some of these rows: prompt, expected answer and answer"
    )


class CheckpointSaved(Message):
    """A complete directory on the local disk: a public model of an epoch's end, or a recovery snapshot."""

    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    kind: Literal["public", "snapshot"]
    step: int
    path: str = Field(description="Relative to the run directory")


class Scored(BaseModel):
    """A part of the scorecard, which is stored with its job and shown as it is, whichever release measured it."""

    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings")


class Measure(Scored):
    """One metric of base and tuned model on the same rows, from 0 to 1."""

    base: float
    tuned: float
    gain: float
    low: float = Field(description="Lower end of the gain's paired 95 % interval")
    high: float
    p: float | None = Field(None, description="For a fraction: the exact two-sided p of McNemar's test")


class PrecisionMeasure(Measure):
    """One metric on a base in another precision, and the tuned model's difference from the precision of `scored_in`."""

    difference: float
    difference_low: float = Field(description="Lower end of the difference's paired 95 % interval")
    difference_high: float
    difference_p: float | None = Field(None, description="For a fraction: the exact two-sided p of McNemar's test")


class UnquantisedScore(Scored):
    """Base and adapter on the same rows, where the base is not quantised as it was in training."""

    scored_in: str = Field(description="Type of the base's linear layers: `bfloat16`, or `float32` on a CPU")
    metrics: dict[str, PrecisionMeasure] = {}
    left_out: str | None = Field(None, description="Why it was not measured")


class LabelShares(Scored):
    """How many test rows want a label, and the share of them that each model gets right."""

    rows: int
    base: float
    tuned: float


class Forgetting(Scored):
    """How far the tuned model has moved from its base: means over the tokens of human answers to general prompts."""

    prompts: int
    tokens: int
    kl: float = Field(description="KL(base || tuned), with the lower and upper end of its 95 % interval over prompts")
    kl_low: float
    kl_high: float
    base_nll: float = Field(description="The base's mean loss on the answers")
    tuned_nll: float
    nll_change: float
    nll_change_low: float
    nll_change_high: float


class GeneralScore(Scored):
    """Base and tuned model on multiple-choice questions, by the log-likelihood of each choice."""

    benchmark: str
    items: int
    base_accuracy: float = Field(description="Fraction of items whose correct choice has the highest log-likelihood")
    tuned_accuracy: float
    change: float
    change_low: float = Field(description="Lower end of the change's paired 95 % interval")
    change_high: float
    p: float = Field(description="The exact two-sided p of McNemar's test")
    base_accuracy_norm: float = Field(
        description="The same with log-likelihoods divided by the choice's number of characters"
    )
    tuned_accuracy_norm: float
    forgetting: Forgetting | None = None


class Sample(Scored):
    """A test row as both models answered it."""

    prompt: str = Field(description="The row's last message before the answer")
    wanted: str
    base: str = Field(description="The base's answer")
    tuned: str


class Scorecard(Scored):
    """Base and tuned model on the same rows, same prompt, greedy, same token limit."""

    rows: int
    base_exact: float = Field(
        description="Fraction of answers equal to the expected one (as JSON if it is JSON); for `preferences`, the "
        "fraction of pairs whose preferred answer is more likely"
    )
    tuned_exact: float
    gain: float
    gain_low: float = Field(description="Lower end of the gain's paired 95 % interval")
    gain_high: float
    samples: list[Sample] = Field(default=[], description="Some rows, spread over the file")
    scored_in: str | None = Field(None, description="Type of the base's linear layers: `nf4`, `bfloat16`, ...")
    task: str | None = Field(
        None, description="Kind of the expected answers: `calls`, `json`, `labels`, `text`, `other` or `preferences`"
    )
    primary: str = Field("exact", description="The metric of `metrics` by which the task is judged")
    metrics: dict[str, Measure] = {}
    labels: dict[str, LabelShares] = Field(default={}, description="For a task with labels: each label's metrics")
    general: GeneralScore | None = Field(None, description="General ability of base and tuned model beside the task")
    unquantised: UnquantisedScore | None = Field(
        None, description="QLoRA with `evaluation.unquantised`: the same with the unquantised base"
    )


class Score(Scorecard):
    """The scorecard, once base and tuned model have answered."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["score"] = "score"


Verdict = Literal["passed", "failed", "inconclusive"]


class GateCheck(Message):
    """One limit of a gate, and what was measured with its 95 % interval; nulls where nothing was."""

    name: Literal["min_task_gain", "max_general_drop", "max_kl"]
    limit: float
    value: float | None
    low: float | None
    high: float | None
    status: Verdict


class Gated(Message):
    """What the gate says of the tuned model. A model that is withheld is stored and not published."""

    type: Literal["gated"] = "gated"
    status: Verdict
    withheld: bool
    checks: list[GateCheck]


GREEDY = "greedy.jsonl"
"""In a run directory: what the tuned model answered to test rows, a `GreedyAnswer` a line."""


class GreedyAnswer(Message):
    """A test row as the tuned model answered it in the scorecard."""

    row: int = Field(description="Its number in the file, from 1")
    messages: list[dict[str, Any]] = Field(description="Token ids before the answer")
    tools: list[dict[str, Any]] | None = None
    prompt_ids: list[int]
    ids: list[int] = Field(description="The answer's tokens, with the stop token that ended it")
    limit: int = Field(description="Token limit of the answer")


class TokenDifference(Scored):
    """The first token in which the model server differs from the trainer's evaluation."""

    row: int = Field(description="The row's number in the test file, from 1")
    place: Literal["prompt", "answer"]
    position: int = Field(description="The token's number in this place, from 1")
    trained: str | None = Field(description="The evaluation's token; null if its answer has ended")
    served: str | None = Field(description="The model server's token; null if its answer has ended")
    gap: float | None = Field(None, description="Difference between the logits of both tokens in the model server")

    @property
    def summary(self) -> str:
        """The difference in a sentence."""
        served, trained = ("the end" if token is None else f"`{token}`" for token in (self.served, self.trained))
        gap = "" if self.gap is None else f" (their logits are {self.gap:.3f} apart)"
        return (
            f"The first difference is in row {self.row}, token {self.position} of the {self.place}: {served} instead "
            f"of {trained}{gap}."
        )


class Served(Scored):
    """Whether the model server, on the files that are published, gave the answers of the scorecard."""

    status: Literal["equal", "differs", "refused", "not_compared"] = Field(
        description="`refused`: the model server cannot load the model. `not_compared`: the check itself failed"
    )
    rows: int = Field(0, description="Test rows that were answered again")
    equal: int = Field(0, description="Rows with the same prompt and answer, token by token")
    ties: int = Field(0, description="Rows whose first differing tokens are equally likely up to rounding")
    tokens: int = Field(0, description="Tokens of these answers")
    precision: str | None = Field(None, description="`float32`, in which all rows must be equal, or `bfloat16`")
    first_difference: TokenDifference | None = None
    reason: str | None = Field(None, description="Why the model was refused or not compared")

    @property
    def withheld(self) -> bool:
        """Whether the model is kept from use until its owner publishes it."""
        return self.status in {"differs", "refused"}

    @property
    def summary(self) -> str:
        """The verdict in a sentence or two."""
        if self.reason is not None:
            verb = "cannot load the model" if self.status == "refused" else "was not compared with the scorecard"
            return f"The model server {verb}: {self.reason}"
        ties = f", {self.ties} of them up to a tie" if self.ties else ""
        text = (
            f"The model server gave the scorecard's answers to {self.equal + self.ties} of {self.rows} test rows{ties} "
            f"({self.tokens} tokens, {self.precision})."
        )
        return text if self.first_difference is None else f"{text} {self.first_difference.summary}"


class Exported(Message):
    """A folder or file for other programs was written into the artifact, or was refused; `message` says why."""

    type: Literal["exported"] = "exported"
    path: str = Field(description="Relative to the artifact")
    message: str
    is_refused: bool = False


class Spent(Message):
    """What a part of a run took. What its units are, `worker.trainer.step_timer` says."""

    seconds: float
    units: float


class StepTimes(Message):
    """Sums over optimizer steps, from which a line is fitted: seconds of a step, and of each of its tokens."""

    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    tokens_squared: float = 0.0
    seconds_tokens: float = 0.0

    def add(self, seconds: float, tokens: float) -> "StepTimes":
        """Returns the sums with one more step."""
        return StepTimes(
            steps=self.steps + 1,
            seconds=self.seconds + seconds,
            tokens=self.tokens + tokens,
            tokens_squared=self.tokens_squared + tokens * tokens,
            seconds_tokens=self.seconds_tokens + seconds * tokens,
        )


class Latency(BaseModel):
    """What requests to the tuned model take on the device of its run, each alone."""

    device: str = Field(description="The device's name by its driver, or cpu")
    p50_seconds: float = Field(description="Median over some test rows")
    prompt_tokens: float = Field(description="Mean per request")
    answer_tokens: float = Field(description="Mean per answer")


class Finished(Message):
    """`out/` is complete. The process exits 0 after this."""

    type: Literal["finished"] = "finished"
    path: str = "out"
    step: int = Field(description="The step whose weights were exported")
    steps: int = Field(description="Steps that were run")
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int | None = Field(None, description="Maximum bytes allocated on one GPU")
    stopped_early: bool = False
    spent: dict[str, Spent] = Field({}, description="Duration of the run's parts, by name")
    step_times: StepTimes | None = None
    latency: Latency | None = Field(
        None, description="Latency of the tuned model; absent without a test file of answers"
    )


class Paused(Message):
    """Asked to stop by SIGTERM: a snapshot was saved first. The process exits 75 after this."""

    type: Literal["paused"] = "paused"
    step: int
    path: str | None


class Failed(Message):
    """The run cannot go on. `kind` decides what the supervisor does: see `worker.supervisor`."""

    type: Literal["failed"] = "failed"
    kind: Literal["user_error", "nan_loss", "gpu_oom", "crashed"]
    code: str
    message: str
    param: str | None = None


Spoken = Annotated[
    Phase | Started | Step | Evaluated | CheckpointSaved | Score | Gated | Exported | Finished | Paused | Failed,
    Field(discriminator="type"),
]
_ADAPTER: TypeAdapter[Spoken] = TypeAdapter(Spoken)

EXIT_PAUSED = 75
"""EX_TEMPFAIL of sysexits.h: saved, come again."""
EXIT_USER_ERROR = 65
"""EX_DATAERR of sysexits.h: the rows or the spec are at fault; do not try again."""


_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")


def parse(line: bytes) -> Spoken:
    """Parses one line of a trainer's standard output. Raises pydantic.ValidationError for anything else.

    Models' answers and libraries' messages may contain the character NUL, which PostgreSQL cannot store: it is replaced
    by U+FFFD.
    """
    return _ADAPTER.validate_json(_NUL.sub(rb"\1\\ufffd", line))
