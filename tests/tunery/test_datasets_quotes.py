"""Answers that quote their question: a value that the question lacks belongs to another question's answer."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from tunery.datasets.report import mislabels, quotes
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, Turn

CITIES = ("Oslo", "Rome", "Paris", "Lima")
NAMES = ("Anna", "Boris", "Chloe", "Dmitri", "Elif", "Farid", "Greta", "Hugo")
ASKED = (
    "{name} wants {seats} seats to {city} on day {at}",
    "Book {seats} places for {name}, going to {city}, day {at}",
    "to {city}: {seats} tickets, name {name}, day {at}",
)
WHY = "Has '{}', which is not in the question, although similar answers quote the question."


def row(line: int, question: str, **answer: Any) -> Row:
    return Row(line, (Turn("user", question), Turn("assistant", json.dumps(answer))))


def weather(line: int, asked: str, **other: Any) -> Row:
    slots = {"city": asked, "days": [f"day {line}"]} | other
    return row(line, f"Weather in {asked.upper()},  day {line}?", about="forecast", slots=slots, note="none of these")


def booking(line: int) -> Row:
    return row(line, f"Book a table for {line}", about="food", slots={"party": str(line)}, note="nor this one")


def rows_of(count: int) -> list[Row]:
    return [booking(at) if at % 2 else weather(at, CITIES[at % 4]) for at in range(count)]


def missing(rows: list[Row]) -> dict[int, str]:
    return {line: value for line, (_, value) in quotes.find(Case(rows)).missing.items()}


def named(rows: list[Row]) -> list[tuple[int, str]]:
    return [(finding.lines[0], finding.why) for finding in mislabels.find(Case(rows))]


def trips(wrong: dict[int, dict[str, Any]], spelt: dict[int, str] | None = None) -> list[Row]:
    """Rows whose answers quote a name, a city and a number, all of which recur. `spelt`: a number in words, by line."""
    dice = random.Random(21)
    made = []
    for at in range(1, 121):
        said = {"name": dice.choice(NAMES), "city": dice.choice(CITIES), "seats": dice.randint(1, 9)}
        asked = dice.choice(ASKED).format(**said | {"seats": (spelt or {}).get(at, said["seats"])}, at=at + 100)
        made.append(row(at, asked, **said | wrong.get(at, {})))
    return made


def test_a_value_that_is_not_in_its_question_is_named_first() -> None:
    wrong = [weather(80, "Oslo", city="Rome"), weather(81, "Lima", city="Bergen", days=["week 7"])]
    wrong.append(row(82, "Weather in Oslo, day 82?", about="food", slots={"party": "9"}))
    case = Case([*rows_of(60), *wrong])

    share = 1 - 5 * (1 - 60 / 63)
    assert quotes.find(case).missing == {80: (share / 2, "rome"), 81: (share, "bergen"), 82: (share, "9")}
    findings = [(finding.lines, finding.score, finding.why) for finding in mislabels.find(case)]
    assert findings[0] == ([81], share, WHY.format("bergen"))
    assert [lines for lines, _, _ in findings[:3]] == [[81], [82], [80]]
    assert len({line for lines, _, _ in findings for line in lines}) == len(findings)


def test_recurring_values_and_numbers_that_questions_quote_are_no_classes() -> None:
    wrong = {10: {"city": "Cairo"}, 20: {"city": "Berlin"}, 30: {"seats": 12}, 40: {"name": "Zoe"}}

    said = {10: "cairo", 20: "berlin", 30: "12", 40: "zoe"}
    assert sorted(named(trips(wrong))) == [(line, WHY.format(value)) for line, value in said.items()]
    assert named(trips({})) == []


def test_a_recurring_value_of_another_row_is_named() -> None:
    rows = trips({})
    said = json.loads(rows[49].answer)
    wrong = {50: {"city": next(city for city in CITIES if city != said["city"]), "seats": said["seats"] % 9 + 1}}
    assert [line for line, _ in named(trips(wrong))] == [50]


@pytest.mark.parametrize(
    ("asked", "number"),
    [("1,200", 1200), ("1.200", 1200), ("1200", 1200.0), ("2,5", 2.5), ("-4", -4), ("three", 3), ("zwei", 2), ("a", 1)],
)
def test_numbers_are_quoted_however_they_are_written(asked: str, number: float) -> None:
    assert missing(trips({60: {"seats": number}}, {60: asked})) == {}
    assert missing(trips({60: {"seats": 77}}, {60: asked})) == {60: "77"}


@pytest.mark.parametrize(
    ("asked", "value", "is_there"),
    [
        ("13 March 2026", "2026-03-13", True),
        ("3/13/2026", "2026-03-13", True),
        ("14 March 2026", "2026-03-13", False),
        ("half past 3, 30 minutes", "15:30", True),
        ("3 pm", "15:00", True),
        ("4 pm", "15:00", False),
        ("at 13", "room 13", False),
    ],
)
def test_dates_and_times_are_quoted_in_other_forms(asked: str, value: str, is_there: bool) -> None:
    rows = [row(at, f"Job {at}: on week {at} of all", when=f"week {at}") for at in range(100, 180)]
    assert missing([*rows, row(1, f"It is on {asked}", when=value)]) == ({} if is_there else {1: value})


def test_values_that_many_rows_write_in_another_form_are_in_doubt() -> None:
    rows = [row(at, f"Job {at}: on week {at} of all", when=f"week {at}") for at in range(100, 190)]
    rows += [row(at, f"Job {at}: in the week after", when="next week") for at in range(11)]
    certain = [certainty for certainty, _ in quotes.find(Case(rows)).missing.values()]
    assert len(certain) == 11
    assert max(certain) < 0.5  # a recommended cleaning keeps them


def test_a_number_inside_another_is_no_quote() -> None:
    rows = [row(at, f"Table {at} is free", table=at) for at in range(100, 160)]
    assert missing([*rows, row(1, "Table 4711 is free", table=71)]) == {1: "71"}


def journey(at: int, city: str, answer: str | None = None) -> Row:
    return Row(at, (Turn("user", f"Where is trip {at} to {city}?"), Turn("assistant", answer or city)))


def test_short_answers_that_are_no_json_are_quotes_too() -> None:
    rows = [journey(at, CITIES[at % 4]) for at in range(60)]
    assert named([*rows, journey(80, "Lima", "Rome")]) == [(80, WHY.format("rome"))]


def test_a_rare_value_that_its_question_has_is_right() -> None:
    """A classifier prefers another one, as it judges equal questions without having seen any of them."""
    rows = [journey(at, CITIES[at % 4]) for at in range(60)]
    assert named([*rows, *(replace(journey(80, "Bergen"), line=at) for at in range(80, 83))]) == []


def test_topics_that_some_questions_only_describe() -> None:
    """In a fifth of the rows the label is not in the question, as those that ask describe it."""
    about = {"refund": "money back", "delivery": "parcel", "invoice": "bill"}
    topics = list(about)
    rows = []
    for at in range(120):
        topic = topics[at % 3]
        rows.append(row(at, f"{about[topic] if at % 7 == 0 else topic} of order {at}", topic=topic))
    assert missing(rows) == {}
    assert missing([*rows, row(200, "delivery of order 200", topic="refund")]) == {200: "refund"}


def test_labels_that_every_question_lists_are_no_quotes() -> None:
    """A classifier judges them, as it can tell a wrong one."""
    words = {"positive": "great lovely superb fine", "negative": "awful broken bad poor"}
    dice, rows = random.Random(3), []
    for at in range(80):
        label = ("positive", "negative")[at % 2]
        said = " ".join(dice.sample(words[label].split(), 3))
        rows.append(row(at, f"Positive or negative: {said} {at}", label="negative" if at == 40 else label))
    assert quotes.find(Case(rows)).keys == frozenset()
    assert named(rows) == [(40, "Has the label 'negative', whereas similar rows have 'positive'.")]


def test_labels_that_cannot_be_learnt_are_not_judged() -> None:
    dice = random.Random(5)
    words = ["river", "mountain", "bridge", "castle", "violin", "engine", "garden", "planet", "whale", "market"]
    for labels in (("yes", "no"), tuple("abcdefgh")):
        rows = [row(at, " ".join(dice.choices(words, k=6)), label=dice.choice(labels)) for at in range(200)]
        assert named(rows) == []


def test_labels_and_other_texts_are_no_quotes() -> None:
    said = [("yes" if at % 2 else "no", f"because {at * 7}") for at in range(60)]
    rows = [row(at, f"Is {at} good, yes or no?", verdict=one, reason=why) for at, (one, why) in enumerate(said)]

    assert missing([*rows, row(80, "Is it good?", verdict="yes", reason="so")]) == {}


def test_rows_that_mostly_quote_nothing_or_are_few_are_not_judged() -> None:
    wrong = weather(80, "Oslo", city="Rome")

    assert missing([*rows_of(quotes._LEAST - 2), wrong]) == {}
    others = [weather(at, "Oslo", city="Rome") for at in range(100, 120)]
    assert missing([*rows_of(60), *others]) == {}
