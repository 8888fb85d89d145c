"""Truncated answers: how they end, and which words an answer does not end with."""

import random
from collections.abc import Sequence

import doubtful_answers
import numpy as np
import pytest

from tunery.datasets.report import cut_model, dictionary, endings, truncation, vocabulary
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, Turn
from tunery.rows.answer_losses import AnswerEnd, AnswerLoss

ENGLISH = dictionary.Dictionary(
    {"he": 90, "sat": 30, "on": 80, "the": 200, "character": 50, "cat": 20, "mat": 90, "may": 3, "ma": 1, "dog": 8},
    "en",
)


def row(question: str, answer: str, line: int = 1) -> Row:
    return Row(line, (Turn("user", question), Turn("assistant", answer)))


def known_of(*rows: Row, language: dictionary.Dictionary = ENGLISH) -> vocabulary.Vocabulary:
    return vocabulary.Vocabulary(rows, language, ["The do", "the dog"])


def breaks_off(known: vocabulary.Vocabulary, one: Row) -> bool:
    return known.breaks_off(one.answer, one.question, vocabulary.words(one.answer))


def described(answer: str, question: str = "Who?", *others: Row) -> dict[str, float]:
    """The features of an answer in a file with others."""
    known = known_of(row(question, answer), *others)
    return endings.describe(answer, question, known.own(0, answer), known)


@pytest.mark.parametrize(
    ("question", "answer", "breaks"),
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
def test_an_answer_does_not_end_inside_a_word_or_before_one(question: str, answer: str, breaks: bool) -> None:
    one = row(question, answer)
    assert breaks_off(known_of(one), one) is breaks


def test_outside_of_sentences_a_part_of_a_word_is_not_a_word_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = row("Which cats?", "Below, above, behind: cat"), row("Who?", "The cat.")
    monkeypatch.setattr(vocabulary, "_PROSE", 2)  # nothing is a sentence

    assert breaks_off(known_of(one), one) is True
    assert breaks_off(known_of(one, other), one) is False


def test_words_that_another_follows_are_those_of_the_language() -> None:
    one = row("Wer?", "Er zog die Jacke an")
    german = dictionary.Dictionary({"er": 9, "zog": 2, "die": 9, "jacke": 2, "an": 5}, "de")
    assert breaks_off(known_of(one, language=german), one) is False


def test_a_word_with_which_many_answers_end_is_no_break() -> None:
    rows = [row(f"Number {at}?", f"He sat down by the {at} on", at) for at in range(5)]
    assert breaks_off(known_of(rows[0]), rows[0]) is True
    assert breaks_off(known_of(*rows), rows[0]) is False


def answers_of(count: int) -> list[Row]:
    return [row(f"What is said of {at}?", f"He said that {at} is the best of all of them.", at) for at in range(count)]


def test_blanks_at_the_end_are_a_break_where_few_answers_have_them() -> None:
    rows = answers_of(32)
    blank = row("What is said of this?", "He said that this is the best of all of them.\n", 99)
    assert [finding.lines for finding in truncation.find(Case([*rows, blank]))] == [[99]]
    others = [row(one.question, f"{one.answer}\n", one.line) for one in rows[:16]]
    assert list(truncation.find(Case([*others, *rows[16:], blank]))) == []


def test_answers_are_cut_inside_and_after_words_to_learn_from() -> None:
    answer = "12, 34: He sat on the mat. 56, 78"
    cuts = [cut for seed in range(50) for cut in cut_model.cuts(answer, random.Random(seed))]
    inside, after = ({text for kind, text in cuts if kind == one} for one in (cut_model.INSIDE, cut_model.AFTER))
    assert all(answer[len(cut) - 1 : len(cut) + 1].isalpha() for cut in inside)
    assert all(not answer[len(cut) - 1 : len(cut) + 1].isalnum() and cut == cut.rstrip() for cut in after)
    assert (len(inside) > 5, "12, 34: He sat" in after, "12, 34:" in after) == (True, True, True)
    assert {kind for kind, _ in cut_model.cuts("12, 34: 56, 78", random.Random(0))} == {cut_model.AFTER}


def worked(at: int) -> str:
    """A sum that is explained as all others are."""
    name = ("Ann", "Bob", "Cleo", "Dan", "Eve")[at % 5]
    return f"{name} has {at} + 3 = {at + 3} red apples.\nThen {name} eats two of these.\nThe answer is {at + 1}."


def test_an_answer_that_was_cut_after_a_word_lacks_the_usual_last_line() -> None:
    rows = [row(f"How many apples are left of {at} and 3?", worked(at), at) for at in range(1, 60)]
    cut = row("How many apples are left of 7 and 3?", worked(7).partition(" eats")[0], 99)
    assert [finding.lines for finding in truncation.find(Case([*rows, cut]))] == [[99]]


def test_other_answers_say_which_last_lines_are_usual() -> None:
    others = [row(str(at), worked(at), at) for at in range(1, 30)]
    whole, cut = (described(text, "How many?", *others) for text in (worked(40), worked(40).rpartition("\n")[0]))
    named = ("usual last line", "line begins like inner lines", "sums without the usual last line")
    assert [whole[name] for name in named[:2]] == [1, 0]
    assert [cut[name] for name in named[:2]] == [0, 1]
    assert whole[named[2]] == 0 < cut[named[2]]
    assert described(worked(40), "How many?")["usual last line"] == 0  # its own line does not count


@pytest.mark.parametrize(
    ("answer", "lacks"),
    [
        ("He sat on 2 cat", 1),
        ("He sat on two cat", 1),
        ("He sat on 2 cats", 0),
        ("He sat on 1 cat", 0),
        ("He sat on the cat", 0),
        ("He sat on one of the old cat", 1),
        ("He sat on one of the old cats", 0),
        ("He sat on 2 ca", 0),
    ],
)
def test_a_number_is_followed_by_a_plural(answer: str, lacks: int) -> None:
    english = dictionary.Dictionary({"cat": 20, "cats": 10, "he": 90, "sat": 30, "on": 80}, "en")
    one = row("Who?", answer)
    for language, expected in ((english, lacks), (dictionary.Dictionary({"cat": 20, "cats": 10}, "fr"), 0)):
        known = known_of(one, language=language)
        assert endings.describe(answer, "Who?", known.own(0, answer), known)["lacks its s"] == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Name three tips.", "1. Read\n2. Write", (0, 1)),
        ("Name three tips.", "1. Read\n2. Write\n3. Rest", (1, 0)),
        ("Name 3 good short tips.", "Read, write, rest", (1, 0)),
        ("Name tips of 2026.", "1. Read\n2. Write", (0, 0)),
    ],
)
def test_items_are_counted_where_a_number_is_asked_for(question: str, answer: str, expected: tuple[int, int]) -> None:
    found = described(answer, question)
    assert (found["items as asked"], found["fewer items than asked"]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("They say: he sat on the ma", (1, 0, 0)),
        ("They say: he sat on the", (0, 1, 0)),
        ("They say: he sat on the mat", (0, 0, 1)),
        ("They say: she lay by a mat", (0, 0, 0)),
    ],
)
def test_a_copy_of_the_question_breaks_off_before_its_end(answer: str, expected: tuple[int, int, int]) -> None:
    found = described(answer, "Complete: he sat on the mat.")
    named = ("copies a part of a word", "copies before a word", "copies to an end")
    assert tuple(found[name] for name in named) == expected


def test_the_prior_has_every_feature() -> None:
    assert list(described("He sat on the mat")) == list(cut_model._prior()["features"])


def test_rows_after_the_counted_ones_are_compared_with_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_MOST_WORDS", 4)
    known = known_of(row("Who?", "He sat on it"), row("Who?", "It sat on him"))
    assert known.counted == 1
    assert known.own(0, "He sat on it").words == " he sat on it "
    assert known.own(1, "It sat on him") == vocabulary.Own()


def test_answers_without_letters_are_not_judged() -> None:
    rows = [row(f"What is {at} + 1000000?", f"{at} + 1000000 = {at + 1000000}", at) for at in range(40)]
    assert list(truncation.find(Case(rows))) == []


def test_the_words_of_an_answer_count_for_nothing_in_its_own_features() -> None:
    question, whole = "Which animal was it?", "He sat on the hippopotamus"
    other, before = row("Who?", "He sat on the cat"), vocabulary.words("He sat on the")
    known, alone = known_of(row(question, whole), other), known_of(row(question, "He sat on the hippo"), other)
    of_part = known.describe(before, "hippo", known.own(0, whole), question)
    of_cut = alone.describe(before, "hippo", alone.own(0, "He sat on the hippo"), question)
    assert (of_part["new to the file"], of_part["new, longer words too"], of_part["count"]) == (1, 1, 0)
    assert {**of_part, "ends sentences": 0} == {**of_cut, "ends sentences": 0}


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
    found = described(answer)
    assert [found[name] for name in ("code", "code that parses", "code, open")] == code


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
    def odds(inside: list[float], after: float = 0.01) -> np.ndarray:
        return np.array([[1.0, odd, after] for odd in inside])

    many, rare = (cut_model.calibrate(odds(one)) for one in ([9.0] * 6 + [0.02] * 14, [9.0] + [0.02] * 400))
    assert many[0] > 0.7 > 0.5 > rare[0] > many[-1]
    assert cut_model.calibrate(odds([1e4] + [1e-4] * 99))[0] > 0.99  # a single one is found


def test_the_share_of_each_kind_of_cuts_is_estimated() -> None:
    doubtful, whole = [1.0, 0.0, 5.0], [1.0, 0.0, 0.0]
    among_parts = cut_model.calibrate(np.array([doubtful, *[[1.0, 100.0, 0.0]] * 20, *[whole] * 60]))
    among_others = cut_model.calibrate(np.array([doubtful, *[[1.0, 0.0, 100.0]] * 20, *[whole] * 60]))
    assert among_parts[0] < 0.2 < 0.5 < among_others[0]


def found(case: Case) -> list[int]:
    return [line for finding in truncation.find(case) for line in finding.lines]


def test_a_base_is_asked_about_doubtful_answers_alone() -> None:
    asked: list[int] = []

    def ask(rows: Sequence[Row]) -> dict[int, AnswerEnd]:
        asked.extend(row.line for row in rows)
        return {9: AnswerEnd(line=9, end=-4.0, goes_on=9.0), 30: AnswerEnd(line=30, end=-4.0, goes_on=-9.0)}

    assert found(Case(doubtful_answers.rows())) == []
    assert found(Case(doubtful_answers.rows(), ask=ask)) == [9]
    assert asked == [9, 30]


def test_a_base_says_where_an_answer_ends() -> None:
    def ask(_: Sequence[Row]) -> dict[int, AnswerEnd]:
        return {9: AnswerEnd(line=9, end=-0.1), 30: AnswerEnd(line=30, end=-16.0)}

    assert found(Case(doubtful_answers.rows(), ask=ask)) == [30]


def test_losses_that_were_measured_say_so_too() -> None:
    said = {
        at: AnswerLoss(line=at, tokens=9, loss=2, alone=3, end=-4, goes_on=9 if at in (9, 20) else -9)
        for at in range(1, 73)
    }
    assert found(Case(doubtful_answers.rows(), losses=said)) == [9]
    del said[9]
    assert found(Case(doubtful_answers.rows(), losses=said)) == []
    asked: list[int] = []

    def ask(rows: Sequence[Row]) -> dict[int, AnswerEnd]:
        asked.extend(row.line for row in rows)
        return {9: AnswerEnd(line=9, end=-4.0, goes_on=9.0)}

    assert found(Case(doubtful_answers.rows(), losses=said, ask=ask)) == [9]
    assert asked == [9], "the other was measured already"
