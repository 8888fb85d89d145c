"""Answers that refuse as an assistant does, beside those that decline or regret something."""

import pytest
import refusal_texts

from tunery.datasets.report import refusals
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, Turn


def refuses(answer: str) -> bool:
    return bool(list(refusals.find(Case([Row(1, (Turn("user", "q"), Turn("assistant", answer)))]))))


@pytest.mark.parametrize("answer", [*refusal_texts.REFUSALS, *refusal_texts.MORE_REFUSALS])
def test_a_refusal_is_found(answer: str) -> None:
    assert refuses(answer)
    assert not refuses(f"{'The river rises in the hills. ' * 7}{answer}")


@pytest.mark.parametrize("answer", [*refusal_texts.OTHERS, *refusal_texts.MORE_OTHERS])
def test_another_answer_is_no_refusal(answer: str) -> None:
    assert not refuses(answer)
