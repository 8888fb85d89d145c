"""Measures how long an answer takes if its request is alone: in a batch each waits for the others."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from tunery.trainer_protocol import Latency
from worker.trainer import hardware
from worker.trainer.scoring import answers
from worker.trainer.scoring.answers import Question
from worker.trainer.scoring.comparison import Asked, Scored
from worker.trainer.scoring.preferences import Pairs
from worker.trainer.training import Training

_ROWS = 5
"""Test rows that a job's tuned model answers one by one: each costs the job the time of an answer."""


def measure(t: Training, asked: Asked, scored: Scored | None) -> Latency | None:
    """Returns the tuned model's latency; None if it gave no answers. Raises Stopped."""
    if scored is None or isinstance(asked, Pairs):
        return None
    with t.timer.measure_rest("scores"):
        return _measure(t, asked, [row["tuned"] for row in scored[1]])


def _measure(t: Training, asked: list[Question], texts: Sequence[str]) -> Latency:
    limit = answers.token_limit(t.plan.evaluation, asked)

    def answer(question: Question) -> None:
        answers.generate_counted(t, [question], limit, base=False, around=lambda _: nullcontext())

    return Latency(
        device=hardware.device_name(t.device),
        p50_seconds=median_seconds(asked, answer, rows=_ROWS),
        prompt_tokens=statistics.fmean(len(question.prompt_ids) for question in asked),
        answer_tokens=statistics.fmean(count_tokens(t, text) for text in texts),
    )


def median_seconds(asked: Sequence[Question], answer: Callable[[Question], object], *, rows: int) -> float:
    """Returns the median seconds of an answer to one question alone, over `rows` questions spread over the file."""
    count = min(len(asked), rows)
    times = []
    for question in [asked[i * len(asked) // count] for i in range(count)]:
        began = time.perf_counter()
        answer(question)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def count_tokens(t: Training, text: str) -> int:
    """Returns the number of tokens of an answer."""
    return len(t.template.tokenizer.encode(text, add_special_tokens=False).ids)
