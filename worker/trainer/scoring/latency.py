"""Measures how long an answer takes if its request is alone: in a batch each waits for the others."""

import random
import statistics
from collections.abc import Sequence

from tunery.trainer_protocol import Latency
from worker.trainer import hardware
from worker.trainer.scoring import answers
from worker.trainer.scoring.answers import Question
from worker.trainer.scoring.comparison import Asked, Scored
from worker.trainer.scoring.preferences import Pairs
from worker.trainer.training import Training

_ROWS = 5
"""Test rows that a job's tuned model answers one by one: each costs the job the time of an answer."""
_SECONDS = 5.0
"""No further answer is timed after so many seconds."""


def measure(t: Training, asked: Asked, scored: Scored | None) -> Latency | None:
    """Returns the tuned model's latency; None if it gave no answers. Raises Stopped."""
    if scored is None or isinstance(asked, Pairs):
        return None
    with t.timer.measure_rest("scores"):
        return _measure(t, asked, [row["tuned"] for row in scored[1]])


def _measure(t: Training, asked: list[Question], texts: Sequence[str]) -> Latency:
    limit = answers.token_limit(t.plan.evaluation, asked)
    return Latency(
        device=hardware.device_name(t.device),
        p50_seconds=median_seconds(t, asked, limit, rows=_ROWS, base=False),
        prompt_tokens=statistics.fmean(len(question.prompt_ids) for question in asked),
        answer_tokens=statistics.fmean(count_tokens(t, text) for text in texts),
    )


def median_seconds(t: Training, asked: Sequence[Question], limit: int, *, rows: int, base: bool) -> float:
    """Returns the median seconds of an answer of at most `limit` tokens to one question alone, over `rows` questions
    spread over the file, or to some of these, if answers take long.
    """
    count = min(len(asked), rows)
    some = [asked[i * len(asked) // count] for i in range(count)]
    random.Random(0).shuffle(some)  # noqa: S311 (no secret)
    found: list[float] = t.ranks.broadcast(answers.seconds_alone(t, some, limit, base=base, most=_SECONDS))
    return statistics.median(found)


def count_tokens(t: Training, text: str) -> int:
    """Returns the number of tokens of an answer."""
    return len(t.template.tokenizer.encode(text, add_special_tokens=False).ids)
