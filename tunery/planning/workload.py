"""Counts a run's work from its plan and files: steps, tokens, answers, exports. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunery.planning.shape import Shape, trainable_params
from tunery.spec import Full, Plan, Technique

BYTES_A_TOKEN = 4
"""Approximate bytes per token in a file of rows, including its format's syntax."""
TOKENS_A_ROW = 150
"""Assumed tokens per row in a file that is not counted yet."""
ITEMS = {"cpu": 100, "cuda": 800}
PROMPTS = {"cpu": 20, "cuda": 100}
"""Prompts of the general benchmark by device, if the number is "auto"."""
TOKENS_AN_ITEM, TOKENS_A_PROMPT = 46, 106
"""Mean tokens of the shipped questions and prompts, by SmolLM2's tokenizer."""
_UNKNOWN_ANSWER = 64
_REPLAY_ENDS = 0.8
"""Approximate share of a base's own answers that end within the limit."""

Source = Literal["rows", "report", "bytes"]
"""How the tokens of the training file were counted: row by row, from its report, or estimated from its bytes."""


@dataclass(frozen=True)
class Counts:
    """Counts of a job's files. `tokens`, `valid_tokens` and `test_tokens` are those of one epoch or pass."""

    examples: int
    tokens: int
    source: Source
    valid_tokens: int = 0
    test_rows: int = 0
    test_tokens: int = 0

    @classmethod
    def of_bytes(cls, size: int, examples: int | None, max_length: int) -> "Counts":
        """Returns a guess from a file's size. `examples`: its number of rows, if counted."""
        tokens = max(1, size // BYTES_A_TOKEN)
        rows = examples or max(1, tokens // TOKENS_A_ROW)
        return cls(rows, min(tokens, rows * max_length), "bytes")


@dataclass(frozen=True)
class Workload:
    """A run's work. `row_tokens`: those that are read from its files; `tokens`: of all steps; `answers`: by base and
    tuned model, of at most `answer_tokens` each; `replay_answers`: by the base, before training; `scored`: there is a
    test file, and so a scorecard; `pair_tokens`: of test pairs, for each measured model; `reference_tokens`: those that
    the reference model of preference tuning reads once.

    `item_tokens` and `prompt_tokens`: of the general benchmark, for each measured model; `saved_bytes`: of the trained
    weights; `exports`: whole models that are read or written.
    """

    technique: Technique
    shape: Shape
    method: str = "supervised"
    gpus: int = 1
    sharded: bool = False
    row_tokens: float = 0
    steps: int = 1
    tokens: float = 1
    valid_tokens: float = 0
    answers: int = 0
    answer_tokens: int = _UNKNOWN_ANSWER
    replay_answers: int = 0
    replay_answer_tokens: int = _UNKNOWN_ANSWER
    pair_tokens: float = 0
    scored: bool = False
    reference_tokens: float = 0
    item_tokens: int = 0
    prompt_tokens: int = 0
    checkpoints: int = 0
    saved_bytes: int = 0
    exports: int = 0
    source: Source = "rows"


def of_job(plan: Plan, model_info: Mapping[str, Any], counts: Counts, device: str) -> Workload:
    """Returns a job's work on a kind of device, `cuda` or `cpu`, without early stopping."""
    steps_an_epoch = -(-counts.examples // plan.batch_size)
    steps = steps_an_epoch * plan.n_epochs
    validations = _validations(plan, steps_an_epoch, steps) if counts.valid_tokens else 0
    learns = trainable_params(model_info, plan.technique)
    return Workload(
        technique=plan.technique,
        shape=Shape.of(model_info),
        method=plan.method.type,
        gpus=plan.resources.gpus,
        sharded=plan.resources.sharding == "full_shard",
        row_tokens=counts.tokens + counts.valid_tokens,
        steps=steps,
        tokens=counts.tokens * plan.n_epochs / (1 - plan.replay.share if plan.replay else 1),
        valid_tokens=validations * counts.valid_tokens,
        answers=_answers(plan, counts.test_rows) + plan.evaluation.task_rows * validations,
        answer_tokens=_answer_tokens(plan),
        replay_answers=_replay_answers(plan, counts.examples),
        replay_answer_tokens=plan.replay.max_new_tokens if plan.replay else _UNKNOWN_ANSWER,
        pair_tokens=_pair_tokens(plan, counts),
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
    """Returns the scorecard's answers, of which pairs need none."""
    return 0 if plan.method.type == "dpo" else min(test_rows, plan.evaluation.max_rows) * _models(plan)


def _pair_tokens(plan: Plan, counts: Counts) -> float:
    """Returns the tokens of test pairs, whose log-probabilities each model gives."""
    if plan.method.type != "dpo" or not counts.test_rows:
        return 0
    return counts.test_tokens * min(1, plan.evaluation.max_rows / counts.test_rows) * _models(plan)


def _models(plan: Plan) -> int:
    """Returns how many models a scorecard compares: base and tuned model, in two precisions if requested."""
    return 4 if plan.evaluation.unquantised else 2


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
    if general.benchmark == "default":
        items = min(items, ITEMS["cuda"])  # all that are shipped
    prompts = PROMPTS[device] if general.prompts == "auto" else min(general.prompts, PROMPTS["cuda"])
    return {"item_tokens": items * TOKENS_AN_ITEM, "prompt_tokens": prompts * TOKENS_A_PROMPT}


def _exports(plan: Plan) -> int:
    """Returns the approximate number of whole models that exports read or write."""
    export = plan.export
    merges = 0 if isinstance(plan.technique, Full) else 3 * export.needs_merge
    return merges + 2 * len(export.gguf) + 3 * export.fp8
