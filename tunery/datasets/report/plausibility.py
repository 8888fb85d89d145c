"""Finds answers that a base model considers implausible, by losses that a worker has measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from tunery.datasets.report.case import Case, Finding
from tunery.rows.answer_losses import AnswerLoss

_LEAST = 30
"""Answers below which outliers are not looked for."""
_SPREAD = 1.4826
"""Times the median absolute deviation: the standard deviation, where values are normal."""
_FAR = 3.0
_LEAST_LOSS = 0.1
"""Nats per token: an answer that is certain without its question says nothing about the question."""
_ACTION = "Check the row, and correct the answer if it does not belong to the question."


def read(path: Path) -> dict[int, AnswerLoss]:
    """Returns the losses in a file, by line; none where there is no such file."""
    if not path.exists():
        return {}
    return {one.line: one for one in TypeAdapter(list[AnswerLoss]).validate_json(path.read_bytes())}


def figures(losses: Mapping[int, AnswerLoss]) -> dict[str, Any]:
    """Returns how many answers a base has judged, and the median of their losses in nats per token."""
    if not losses:
        return {}
    medians = np.median([[one.loss, one.alone] for one in losses.values()], axis=0).round(3).tolist()
    return {"judged": len(losses), "loss": medians[0], "loss_without_question": medians[1]}


def find(case: Case) -> Iterator[Finding]:
    """Finds free-text answers that are far less likely after their question than the file's others."""
    labelled = {line for task in case.tasks for line in task.labels}
    named = case.lines_found("empty_output", "truncated_output", "wrong_roles")
    judged = [one for line, one in case.losses.items() if line not in labelled | named]
    if len(judged) < _LEAST:
        return
    for one, far in zip(judged, outliers(judged), strict=True):
        if far >= _FAR:
            why = (
                f"The answer's tokens have a mean loss of {one.loss:.1f} nats under the base, and of {one.alone:.1f} "
                "without the question: the question hardly makes the answer more likely, or makes it less likely."
            )
            yield Finding("implausible_output", [one.line], float(1 - _FAR / (_FAR + far)), why, _ACTION)


def outliers(judged: Sequence[AnswerLoss]) -> NDArray[np.float64]:
    """How many robust standard deviations each answer's loss is above the file's median, as a share of its loss without
    the question: the loss alone would name rare words and short answers, which are hard to guess and right."""
    ratios = np.array([one.loss / max(one.alone, _LEAST_LOSS) for one in judged])
    middle = np.median(ratios)
    spread = _SPREAD * np.median(np.abs(ratios - middle))
    found: NDArray[np.float64] = (ratios - middle) / max(float(spread), 1e-6)
    return found
