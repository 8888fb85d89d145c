"""Truncated answers: how they end, and which words an answer does not end with."""

import random

import numpy as np
import pytest

from tunery.datasets.report import cut_model, dictionary, endings, truncation, vocabulary
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, Turn

ENGLISH = dictionary.Dictionary(
    {"he": 90, "sat": 30, "on": 80, "the": 200, "character": 50, "cat": 20, "mat": 90, "may": 3, "ma": 1, "dog": 8},
    "en",
)


def row(question: str, answer: str, line: int = 1) -> Row:
    return Row(line, (Turn("user", question), Turn("assistant", answer)))


def known_of(*rows: Row, language: dictionary.Dictionary = ENGLISH) -> vocabulary.Vocabulary:
    texts = [text for one in rows for text in (one.question, one.answer)]
    return vocabulary.Vocabulary([*texts, "The do", "the dog"], [one.answer for one in rows], language)


@pytest.mark.parametrize(
    ("question", "answer", "breaks_off"),
    [
        ("Who stood on the sideline?", "He stood on the sideli", True),
        ("Who sat?", "He sat on the sideline", False),
        ("Who?", "He sat on the characte", True),
        ("Who?", "He sat on the character", False),
        ("Who?", "He sat on the Zurichbe", False),  # a name that begins no word
        ("Who?", "Er sagte uns: das characte", False),  # of another language
        ("Who?", "He sat on the c", True),
        ("Who?", "He sat on the cat", False),
        ("Who?", "He sat by the o", True),
        ("Who?", "He sat by the O", False),
        ("Who?", "The o is the o", False),  # a name of something
        ("Who?", "He sat on the", True),
        ("Who?", "He may", False),  # short enough for a label
        ("Who?", "He sat on the ma", True),  # more likely a part of "mat" than the word "ma"
        ("Who?", "He sat on the Ma", False),
        ("Who?", "He sat on the dog'", True),
        ("Who?", "He sat on the 'dog'", False),
        ("Which do you mean?", "He sat on the whic", True),
        ("Which do you mean?", "Which do you mean: the whic", True),
        ("Which cats?", "He sat on the cat", True),
        ("Which cat of all cats?", "He sat on the cat", False),
        ("Which which?", "He sat on the which", True),  # a word that another one follows
    ],
)
def test_an_answer_does_not_end_inside_a_word_or_before_one(question: str, answer: str, breaks_off: bool) -> None:
    one = row(question, answer)
    assert known_of(one).breaks_off(one) is breaks_off


def test_outside_of_sentences_a_part_of_a_word_is_not_a_word_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = row("Which cats?", "Below, above, behind: cat"), row("Who?", "The cat.")
    monkeypatch.setattr(vocabulary, "_PROSE", 2)  # nothing is a sentence

    assert known_of(one).breaks_off(one) is True
    assert known_of(one, other).breaks_off(one) is False


def test_words_that_another_follows_are_those_of_the_language() -> None:
    one = row("Wer?", "Er zog die Jacke an")
    german = dictionary.Dictionary({"er": 9, "zog": 2, "die": 9, "jacke": 2, "an": 5}, "de")
    assert known_of(one, language=german).breaks_off(one) is False


def test_a_word_with_which_many_answers_end_is_no_break() -> None:
    rows = [row(f"Number {at}?", f"He sat down by the {at} on", at) for at in range(5)]
    assert known_of(rows[0]).breaks_off(rows[0]) is True
    assert known_of(*rows).breaks_off(rows[0]) is False


def answers_of(count: int) -> list[Row]:
    return [row(f"What is said of {at}?", f"He said that {at} is the best of all of them.", at) for at in range(count)]


def test_blanks_at_the_end_are_a_break_where_few_answers_have_them() -> None:
    rows = answers_of(32)
    blank = row("What is said of this?", "He said that this is the best of all of them.\n", 99)
    assert [finding.lines for finding in truncation.find(Case([*rows, blank]))] == [[99]]
    others = [row(one.question, f"{one.answer}\n", one.line) for one in rows[:16]]
    assert list(truncation.find(Case([*others, *rows[16:], blank]))) == []


def test_answers_are_cut_inside_words_to_learn_from() -> None:
    answer = "12, 34: He sat on the mat. 56, 78"
    cuts = [cut for seed in range(50) for cut in cut_model._cuts(answer, random.Random(seed))]
    assert all(answer[len(cut) - 1 : len(cut) + 1].isalpha() for cut in cuts)
    assert len({len(cut) for cut in cuts}) > 5
    assert list(cut_model._cuts("12, 34: 56, 78", random.Random(0))) == []


def test_answers_without_letters_are_not_judged() -> None:
    rows = [row(f"What is {at} + 1000000?", f"{at} + 1000000 = {at + 1000000}", at) for at in range(40)]
    assert list(truncation.find(Case(rows))) == []


def test_the_words_of_an_answer_count_for_nothing_in_its_own_features() -> None:
    question, whole = "Which animal was it?", "He sat on the hippopotamus"
    other = row("Who?", "He sat on the cat")
    before = vocabulary.words("He sat on the")
    alone = known_of(row(question, whole), other).describe(before, "hippo", vocabulary.words(whole), [])
    cut = known_of(row(question, "He sat on the hippo"), other).describe(before, "hippo", [*before, "hippo"], [])
    assert alone[1:6] == cut[1:6] == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert alone[7:] == cut[7:]


def test_the_dictionary_is_that_of_the_language_that_most_texts_have() -> None:
    english = dictionary.of(
        [
            "Where is my new card, please?",
            "I would like to close my account today.",
            "How do I change it?",
            "Bonjour tout le monde, comment allez-vous ?",
        ]
    )
    assert (english.frequency("dog") > 0, english.frequency("dog\u2019s") > 0) == (True, True)
    assert (english.frequency("minimi"), english.longer("minimi") > 0) == (0, True)
    assert dictionary.of(["", "x = 1"]).fraction(["the"]) == 0


def test_words_of_scripts_without_blanks_are_their_signs() -> None:
    assert vocabulary.words("\u6771\u4eac\u3078 Don't GO") == ["\u6771", "\u4eac", "\u3078", "don't", "go"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(x):\n    return x", [1, 1, 0]),
        ("def f(x):\n    for y in range(", [1, 0, 1]),
        ("The cat sat.", [0, 0, 0]),
    ],
)
def test_code_is_whole_where_it_parses(answer: str, code: list[float]) -> None:
    assert endings.read_code(answer, answer.count("\n") + 1) == code


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("So 490/2 = 245", [1, 0]),
        ("So 490/2 = 24", [0, 1]),
        ("2 x $1,000 = $2,000", [1, 0]),
        ("1/3 = 0.33", [1, 0]),
        ("1/0 = 3", [0, 0]),
        ("490/2 = 7", [0, 0]),
        ("no sum", [0, 0]),
    ],
)
def test_results_of_sums_are_read(answer: str, found: list[float]) -> None:
    assert endings.read_sum(answer) == found


def test_the_share_of_answers_that_break_off_is_estimated() -> None:
    scores = np.array([0.9] * 6 + [0.02] * 14)
    few = np.array([0.9] + [0.02] * 400)
    many, rare = (cut_model.calibrate(cut_model.odds(one)) for one in (scores, few))
    assert many[0] > 0.7 > 0.5 > rare[0] > many[-1]
    assert cut_model.calibrate(cut_model.odds(np.array([1.0] + [0.0] * 99)))[0] > 0.99  # a single one is found
