"""Measures the task's score on a sample of the validation rows, at every evaluation of a run.

Why not on the test rows: choosing a step by them would make the scorecard too favourable.
"""

from pathlib import Path
from typing import Any

from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import find_encoder
from tunery.rows.messages import is_answerable
from tunery.rows.template import ChatTemplate
from tunery.spec import Plan
from worker.trainer.data import read_parsed
from worker.trainer.scoring import answers, metrics
from worker.trainer.scoring.answers import Question
from worker.trainer.training import Training

_SHOWN, _SHOWN_CHARACTERS = 3, 500


def questions(folder: Path, plan: Plan, template: ChatTemplate) -> list[Question]:
    """Returns questions from `evaluation.task_rows` validation rows across the file. Raises InvalidTrainingFile."""
    path, count = folder / "data" / "valid.jsonl", plan.evaluation.task_rows
    if not count or not path.exists():
        return []
    parsed = read_parsed(path, "validation", find_encoder(plan.method, "validation", plan.columns))
    rows = [example for _, example in parsed if is_answerable(example)]
    count = min(count, len(rows))
    asked = answers.questions(template, [rows[i * len(rows) // count] for i in range(count)])
    if not asked:
        reason = (
            "No example ends with an answer, by which task_rows are scored. Add such examples, or set task_rows to 0."
        )
        raise InvalidTrainingFile(param="validation_file", role="validation", reason=reason)
    return asked


def measure(t: Training) -> dict[str, Any]:
    """Returns the task's fields of an `Evaluated` message; none if they are not asked for."""
    asked = t.task_questions
    if not asked:
        return {}
    t.stepper.make_room()
    given = answers.answer_at_once(t, asked)
    _, (metric, *_) = metrics.choose(asked)
    places = range(0, len(asked), max(1, len(asked) // _SHOWN))[:_SHOWN]
    return {
        "task_metric": metric.name,
        "task_score": metrics.figure(metric.rates(asked, given)),
        "task_rows": len(asked),
        "samples": [_sample(asked[i], given[i]) for i in places],
    }


def _sample(question: Question, answer: str) -> dict[str, Any]:
    prompt = question.messages[-1].get("content", "") if question.messages else ""
    texts = {"prompt": prompt, "wanted": question.wanted, "answer": answer}
    return {name: str(text)[:_SHOWN_CHARACTERS] for name, text in texts.items()}
