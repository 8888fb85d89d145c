"""Labels in a spelling that hardly any row has."""

import json

import pytest

from tunery.datasets.report import mislabels
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import Row, Turn

CLASSES = ("card_arrival", "change_pin", "lost_card", "A+")
COMMON = 24


def found(*answers: str, keyed: bool = False, common: int = COMMON) -> list[Finding]:
    """Returns the findings of `common` rows of each class and one row for each of the answers, on lines from 201."""
    labels = {at: CLASSES[at % len(CLASSES)] for at in range(1, common * len(CLASSES) + 1)}
    labels |= dict(enumerate(answers, 201))
    said = {line: json.dumps({"intent": label}) if keyed else label for line, label in labels.items()}
    rows = [Row(at, (Turn("user", f"Question {at}."), Turn("assistant", said[at]))) for at in said]
    return list(mislabels.find(Case(rows)))


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("CARD_ARRIVAL", "'CARD_ARRIVAL'"),
        ("card arrival", "'card arrival'"),
        ("card-arrival", "'card-arrival'"),
        ("CardArrival", "'CardArrival'"),
        ("card_arrival ", "'card_arrival '"),
        ('"card_arrival"', "'\"card_arrival\"'"),
        ("\u200bcard_arrival", "'\\u200bcard_arrival'"),
        ("card_arrivals", "'card_arrivals'"),
        ("card_arival", "'card_arival'"),
        ("c\u0430rd_arrival", "'c\u0430rd_arrival'"),
    ],
)
def test_a_rare_spelling_of_a_label(answer: str, shown: str, keyed: bool) -> None:
    [one] = found(answer, keyed=keyed)
    assert (one.kind, one.lines) == ("mislabelled", [201])
    assert one.score >= 0.5
    what = "the intent" if keyed else "the answer"
    assert one.why.startswith(f"Has {what} {shown}, which {COMMON} rows write 'card_arrival'.")
    assert one.action == "Write 'card_arrival', unless another label is meant."


def test_a_letter_that_looks_like_another_is_named() -> None:
    [one] = found("c\u0430rd_arrival")
    assert one.why.endswith("It has CYRILLIC SMALL LETTER A.")


def test_a_label_that_a_single_row_has_is_doubtful() -> None:
    [one] = found("unknown")
    assert one.why == "Is the only row with the answer 'unknown'."
    assert one.score < 0.5


@pytest.mark.parametrize(
    "answers",
    [
        ("Card_arrival",) * 6,  # a habit of the file
        ("A", "A", "B", "B"),
        ("card_arrival_2", "card_arrival_2", "card_arrival_3", "card_arrival_3"),
        ("top_up",) * 6,
    ],
)
def test_other_labels_are_no_spellings(answers: tuple[str, ...]) -> None:
    assert found(*answers) == []


def test_a_file_with_many_rare_values_has_no_single_ones() -> None:
    assert found(*(f"{chr(97 + at) * 5} {at}" for at in range(12))) == []
