"""Pairs of similar rows: compared exactly, and bounded in files whose rows are all similar."""

import json
import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.datasets.report import diversity, duplicates, leaks, maker, neighbours, shingles, usable
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, Turn

DICE = random.Random(5)
WORDS = ["".join(DICE.choices("abcdefghijklmnopqrstuvwxyz", k=DICE.randint(2, 9))) for _ in range(3000)]


@pytest.fixture(autouse=True)
def _same_rows_in_any_order_of_tests() -> None:
    DICE.seed(5)


def row(line: int, question: str, answer: str = "yes") -> Row:
    return Row(line, (Turn("user", question), Turn("assistant", answer)))


def said(count: int) -> list[str]:
    return DICE.choices(WORDS, k=count)


def changed(words: list[str]) -> str:
    """Returns a text with one of its words replaced."""
    at = DICE.randrange(len(words))
    return " ".join([*words[:at], *said(1), *words[at + 1 :]])


def jaccard(one: str, other: str) -> float:
    """Computes the similarity by its definition."""
    first, second = ({text[at : at + 3] for at in range(len(text) - 2)} or {text} for text in (one, other))
    return len(first & second) / len(first | second)


@given(st.lists(st.text(st.sampled_from("abc é漢\U0001f600\ud800"), max_size=12), min_size=2, max_size=6))
def test_similarity_is_that_of_the_shingles(some: list[str]) -> None:
    pairs = list(combinations(some, 2))
    assert shingles.similarities(pairs) == [jaccard(*pair) for pair in pairs]


def test_a_text_longer_than_what_is_hashed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "_CHARACTERS", 1000)
    one = "".join(map(chr, random.Random(1).choices(range(0x4E00, 0x5E00), k=5000)))
    other = one[:3000] + "0" + one[3000:]
    pairs = [(one, other), ("abcd", one), (one[:1001], one[:1002])]
    assert shingles.similarities(pairs) == [jaccard(*pair) for pair in pairs]


def test_a_file_of_near_duplicates_has_a_bounded_number_of_pairs() -> None:
    words, answer = said(40), said(40)
    rows = [row(line, changed(words), changed(answer)) for line in range(1, 3001)]
    case = Case([*rows, row(3001, "What else is there?", "Nothing.")])
    case.findings += duplicates.find_near(case)
    assert 2900 < len(case.pairs) <= 6 * 3000
    assert diversity.figures(case)["prompts"] <= 5
    assert usable.count(case.rows, case.findings)["rows"] < 30  # they are paired with the same first ones


def test_every_row_of_a_large_group_is_a_leak() -> None:
    words = said(40)
    rows = [row(line, changed(words)) for line in range(1, 501)]
    found = list(leaks.find(Case(rows, [row(1, changed(words)), row(2, "Nothing else.")])))
    assert len(found) > 490
    assert {finding.against[0] for finding in found} == {1}


def test_the_closest_row_of_the_other_file_is_named() -> None:
    words = said(40)
    asked = " ".join(words)
    against = [row(line, changed(changed(words).split())) for line in range(1, 9)] + [row(9, f"{asked} {WORDS[0]}")]
    (finding,) = leaks.find(Case([row(1, asked)], against))
    assert finding.against == [9]


def test_similar_rows_among_rows_with_a_long_common_text() -> None:
    """The common text makes rows candidates of each other that are not similar enough."""
    common = said(75)
    own = [[*common, *said(25)] for _ in range(2000)]
    asked = [" ".join(words) for words in own] + [changed(words) for words in own[-100:]]
    assert jaccard(asked[0], asked[1]) < neighbours.NEAR < jaccard(asked[-1], asked[1999])
    pairs = {(pair.first.line, pair.second.line) for pair in neighbours.find([row(*one) for one in enumerate(asked)])}
    assert pairs >= {(at, at + 100) for at in range(1900, 2000)}


def test_rows_of_similar_questions_are_paired_a_few_times_each() -> None:
    words = said(30)
    asked = [changed(words) for _ in range(30)]
    rows = [row(line, asked[line % 30], f"answer {line}") for line in range(300)]
    pairs = neighbours.find(rows)
    assert len(pairs) <= 300 + 5 * 300
    assert all(not pair.leaked and pair.first.line != pair.second.line for pair in pairs)
    assert len({(pair.first.line, pair.second.line) for pair in pairs}) == len(pairs)


def test_no_rows_have_no_pairs() -> None:
    assert neighbours.find([]) == []
    assert neighbours.find([row(1, "Only this")], [row(1, "Another one")]) == []


def test_a_report_on_a_few_very_long_rows(tmp_path: Path) -> None:
    """Their shingles are thousands, and their lines have no ends."""
    words = said(15_000)
    chats = [[("user", changed(words)), ("assistant", f"{changed(words)}.")] for _ in range(5)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = [finding.lines for finding in maker.make(path).findings if finding.kind == "near_duplicate"]
    assert sorted(found) == [list(pair) for pair in combinations(range(1, 6), 2)]
