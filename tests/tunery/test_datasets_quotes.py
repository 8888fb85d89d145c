"""Answers that quote their question: a value that the question lacks belongs to another question's answer."""

import json
from typing import Any

from tunery.datasets.report import mislabels, quotes
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, Turn

CITIES = ("Oslo", "Rome", "Paris", "Lima")


def row(line: int, question: str, **answer: Any) -> Row:
    return Row(line, (Turn("user", question), Turn("assistant", json.dumps(answer))))


def weather(line: int, asked: str, **other: Any) -> Row:
    slots = {"city": asked, "days": [f"day {line}"]} | other
    return row(line, f"Weather in {asked.upper()},  day {line}?", intent="weather", slots=slots, note="none of these")


def booking(line: int) -> Row:
    return row(line, f"Book a table for {line}", intent="book", slots={"party": str(line)}, note="nor this one")


def rows_of(count: int) -> list[Row]:
    return [booking(at) if at % 2 else weather(at, CITIES[at % 4]) for at in range(count)]


def test_a_value_that_is_not_in_its_question_is_named_first() -> None:
    wrong = [weather(80, "Oslo", city="Rome"), weather(81, "Lima", city="Bergen", days=["week 7"])]
    wrong.append(row(82, "Weather in Oslo, day 82?", intent="book", slots={"party": "9"}))
    case = Case([*rows_of(60), *wrong])

    assert quotes.missing(case) == {80: (0.5, "rome"), 81: (1.0, "bergen"), 82: (1.0, "9")}
    findings = [(finding.lines, finding.score, finding.why) for finding in mislabels.find(case)]
    why = "Has '{}', which is not in the question, although similar answers quote the question."
    assert findings[0] == ([81], 1.0, why.format("bergen"))
    assert [lines for lines, _, _ in findings[:3]] == [[81], [82], [80]]
    assert len({line for lines, _, _ in findings for line in lines}) == len(findings)


def test_labels_and_other_texts_are_no_quotes() -> None:
    said = [("yes" if at % 2 else "no", f"because {at * 7}") for at in range(60)]
    rows = [row(at, f"Is {at} good, yes or no?", verdict=one, reason=why) for at, (one, why) in enumerate(said)]

    assert quotes.missing(Case([*rows, row(80, "Is it good?", verdict="yes", reason="so")])) == {}


def test_rows_that_mostly_quote_nothing_or_are_few_are_not_judged() -> None:
    wrong = weather(80, "Oslo", city="Rome")

    assert quotes.missing(Case([*rows_of(quotes._LEAST - 2), wrong])) == {}
    others = [weather(at, "Oslo", city="Rome") for at in range(100, 120)]
    assert quotes.missing(Case([*rows_of(60), *others])) == {}
