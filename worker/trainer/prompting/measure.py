"""Scores variants of prompting a model in the same way as a job's scorecard scores its base."""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunery.failures import InvalidTrainingFile
from tunery.planning.intervals import wilson
from tunery.planning.prompting import TIMED_ROWS, AnswerOrder, Figure, PromptScore, Variant
from tunery.rows.encoding import CHATS
from tunery.rows.template import ChatTemplate
from tunery.spec import Run
from worker.trainer import checkpoints, hardware, run
from worker.trainer.data import read_parsed
from worker.trainer.report import MessageWriter, write_lines
from worker.trainer.scoring import answers, latency, metrics
from worker.trainer.scoring.answers import Question
from worker.trainer.scoring.intervals import bootstrap_interval
from worker.trainer.scoring.matching import matches
from worker.trainer.scoring.metrics import Metric
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

Measured = tuple[PromptScore, list[dict[str, Any]]]
"""A variant's score, and every row's answer."""


def answered(folder: Path, order: AnswerOrder) -> list[Measured]:
    """Asks the model in `folder` with each variant. Raises JobFailure."""
    t = run.prepare(folder, MessageWriter(None), StopSignal())
    asked = {variant.name: _questions(folder, t.template, variant) for variant in order.variants}
    done = _Progress(folder, sum(map(len, asked.values())))
    return [_ask(t, variant, asked[variant.name], done, tuned=order.tuned) for variant in order.variants]


def given(folder: Path, order: AnswerOrder) -> list[Measured]:
    """Scores the answers in `given/`, which another program wrote with their tokens and times. Raises JobFailure."""
    stored = Run.model_validate_json((folder / "spec.json").read_text())
    template = ChatTemplate.load(checkpoints.texts(folder), now=stored.now)
    found = []
    for variant in order.variants:
        said = json.loads((folder / "given" / f"{variant.name}.json").read_text())
        asked = _questions(folder, template, variant)
        score = _score(variant, asked, [one["text"] for one in said])
        means = {
            "prompt_tokens": _mean([one["prompt_tokens"] for one in said]),
            "answer_tokens": _mean([one["answer_tokens"] for one in said]),
            "p50_seconds": statistics.median(one["seconds"] for one in said),
        }
        found.append((score.model_copy(update=means), _rows(variant, asked, [one["text"] for one in said])))
    return found


def write(found: Sequence[Measured], out: Path) -> None:
    """Writes scores.json and answers.jsonl."""
    out.mkdir()
    (out / "scores.json").write_text(json.dumps([score.model_dump(mode="json") for score, _ in found]))
    write_lines(out / "answers.jsonl", [row for _, rows in found for row in rows])


class _Progress:
    """Counts answers, and writes the fraction done to `folder`/progress. Those that are timed take seconds in all."""

    def __init__(self, folder: Path, total: int) -> None:
        self._folder, self._total, self._done = folder, max(1, total), 0

    @contextmanager
    def count(self, rows: int) -> Iterator[None]:
        yield
        self._done += rows
        # Renamed into place, so that a reader never sees half a number.
        (self._folder / "progress.new").write_text(f"{self._done / self._total:.3f}")
        (self._folder / "progress.new").rename(self._folder / "progress")


def _questions(folder: Path, template: ChatTemplate, variant: Variant) -> list[Question]:
    rows = read_parsed(folder / "prompts" / f"{variant.name}.jsonl", "test", CHATS)
    found = answers.questions(template, [example for _, example in rows])
    if not found:
        raise InvalidTrainingFile(
            param="eval_file", role="test", reason="No row has an expected answer with text. Add such rows."
        )
    return found


def _ask(t: Training, variant: Variant, asked: list[Question], done: _Progress, *, tuned: bool) -> Measured:
    limit = answers.token_limit(t.plan.evaluation, asked)
    texts = answers.generate_counted(t, asked, limit, base=not tuned, around=done.count)
    figures: dict[str, Any] = {
        "device": hardware.device_name(t.device),
        "prompt_tokens": _mean([len(question.prompt_ids) for question in asked]),
        "answer_tokens": _mean([latency.count_tokens(t, text) for text in texts]),
        "p50_seconds": latency.median_seconds(t, asked, limit, rows=TIMED_ROWS, base=not tuned),
    }
    return _score(variant, asked, texts).model_copy(update=figures), _rows(variant, asked, texts)


def _score(variant: Variant, asked: list[Question], texts: list[str]) -> PromptScore:
    _, chosen = metrics.choose(asked)
    return PromptScore(
        shots=variant.shots,
        nearest=variant.nearest,
        rows=len(asked),
        primary=chosen[0].name,
        metrics={metric.name: _figure(metric, asked, texts) for metric in chosen},
    )


def _figure(metric: Metric, asked: list[Question], texts: list[str]) -> Figure:
    rates = metric.rates(asked, texts)
    if metric.is_binary:
        low, high = wilson(sum(part > 0 for part, _ in rates), len(rates))
    else:
        low, high = bootstrap_interval(rates, [(0.0, 1.0)] * len(rates))
    return Figure(score=metrics.figure(rates), low=low, high=high)


def _rows(variant: Variant, asked: list[Question], texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"shots": variant.shots, "nearest": variant.nearest, "messages": question.messages, "wanted": question.wanted,
         "answer": text, "right": matches(question.wanted, text, is_call=question.is_call)}
        for question, text in zip(asked, texts, strict=True)
    ]  # fmt: skip


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if known else None
