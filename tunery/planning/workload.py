"""What a run has to do, counted from its plan and its files: steps, tokens, answers, files. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunery.planning.shape import Shape, trainable_params
from tunery.spec import Full, Plan, Technique

BYTES_A_TOKEN = 4
"""Of a file of rows, about, with the marks of its format."""
TOKENS_A_ROW = 150
"""Of a file whose rows nobody has counted yet."""
ITEMS = {"cpu": 100, "cuda": 800}
PROMPTS = {"cpu": 20, "cuda": 100}
"""Of the general benchmark, where its number is "auto"."""
TOKENS_AN_ITEM, TOKENS_A_PROMPT = 46, 106
"""Of the shipped questions and prompts, with the tokenizer of SmolLM2."""
_UNKNOWN_ANSWER = 64
_REPLAY_ENDS = 0.8
"""The share of a base's own answers that end within the limit, about."""

Source = Literal["rows", "report", "bytes"]
"""How the tokens of the training file were counted: row by row, in its report, or not at all but for its bytes."""


@dataclass(frozen=True)
class Counts:
    """What is known of a job's files. `tokens` and `valid_tokens` are those of one epoch or pass."""

    examples: int
    tokens: int
    source: Source
    valid_tokens: int = 0
    test_rows: int = 0

    @classmethod
    def of_bytes(cls, size: int, examples: int | None, max_length: int) -> "Counts":
        """Returns a guess from a file's size. `examples`: its rows, where they have been counted."""
        tokens = max(1, size // BYTES_A_TOKEN)
        rows = examples or max(1, tokens // TOKENS_A_ROW)
        return cls(rows, min(tokens, rows * max_length), "bytes")


@dataclass(frozen=True)
class Workload:
    """A run in units. `tokens`: of all steps; `answers`: of at most `answer_tokens` each, by base and tuned model;
    `scored`: there is a test file, whose answers get a scorecard; `reference_tokens`: those of the rows of which
    preference tuning measures the reference once.

    `item_tokens` and `prompt_tokens` of the general benchmark pass through each model that is measured; `saved_bytes`:
    of what learns; `exports`: whole models that are read or written.
    """

    technique: Technique
    shape: Shape
    gpus: int = 1
    sharded: bool = False
    steps: int = 1
    tokens: float = 1
    valid_tokens: float = 0
    answers: int = 0
    answer_tokens: int = _UNKNOWN_ANSWER
    scored: bool = False
    reference_tokens: float = 0
    item_tokens: int = 0
    prompt_tokens: int = 0
    checkpoints: int = 0
    saved_bytes: int = 0
    exports: int = 0
    source: Source = "rows"


def of_job(plan: Plan, model_info: Mapping[str, Any], counts: Counts, device: str) -> Workload:
    """Returns what a job has to do on a kind of device, `cuda` or `cpu`. Early stopping is not foreseen."""
    steps_an_epoch = -(-counts.examples // plan.batch_size)
    steps = steps_an_epoch * plan.n_epochs
    validations = _validations(plan, steps_an_epoch, steps) if counts.valid_tokens else 0
    replay_answers = _replay_answers(plan, counts.examples)
    learns = trainable_params(model_info, plan.technique)
    return Workload(
        technique=plan.technique,
        shape=Shape.of(model_info),
        gpus=plan.resources.gpus,
        sharded=plan.resources.sharding == "full_shard",
        steps=steps,
        tokens=counts.tokens * plan.n_epochs / (1 - plan.replay.share if plan.replay else 1),
        valid_tokens=validations * counts.valid_tokens,
        answers=_answers(plan, counts.test_rows) + plan.evaluation.task_rows * validations + replay_answers,
        answer_tokens=_answer_tokens(plan),
        scored=counts.test_rows > 0,
        reference_tokens=counts.tokens + counts.valid_tokens if plan.method.type == "dpo" else 0,
        **(_general(plan, device) if counts.test_rows else {}),
        checkpoints=plan.n_epochs if plan.keep_checkpoints else 0,
        saved_bytes=learns * (2 if isinstance(plan.technique, Full) else 4),
        exports=_exports(plan),
        source=counts.source,
    )


def _validations(plan: Plan, steps_an_epoch: int, steps: int) -> int:
    every = plan.evaluation.every_steps
    every = steps_an_epoch if every == "auto" else every
    return steps // every + bool(steps % every)


def _answers(plan: Plan, test_rows: int) -> int:
    """Answers of the scorecard: two models, in two precisions where that is asked for. Pairs are only read."""
    if plan.method.type == "dpo":
        return 0
    return min(test_rows, plan.evaluation.max_rows) * (4 if plan.evaluation.unquantised else 2)


def _replay_answers(plan: Plan, examples: int) -> int:
    if plan.replay is None or plan.replay.source != "self":
        return 0
    return round(examples * plan.replay.share / (1 - plan.replay.share) / _REPLAY_ENDS)


def _answer_tokens(plan: Plan) -> int:
    asked = plan.evaluation.max_new_tokens
    return _UNKNOWN_ANSWER if asked == "auto" else asked


def _general(plan: Plan, device: str) -> dict[str, int]:
    general = plan.evaluation.general
    if not general.enabled:
        return {}
    items = ITEMS[device] if general.items == "auto" else general.items
    prompts = PROMPTS[device] if general.prompts == "auto" else general.prompts
    return {"item_tokens": items * TOKENS_AN_ITEM, "prompt_tokens": prompts * TOKENS_A_PROMPT}


def _exports(plan: Plan) -> int:
    """Whole models that exports read or write, about."""
    export = plan.export
    merges = 0 if isinstance(plan.technique, Full) else 3 * export.needs_merge
    return merges + 2 * len(export.gguf) + 3 * export.fp8
