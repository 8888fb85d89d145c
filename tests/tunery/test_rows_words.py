"""Words keep the marks among their letters, wherever texts are split into words."""

import re
import unicodedata

import pytest

from tunery.datasets.report import contradictions, languages, sameness, texts, vocabulary
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, Turn
from tunery.datasets.shots import choice
from tunery.rows import keys
from tunery.rows.words import ends_in_letter, is_of_letters, pattern

HINDI = "मेरा कार्ड खो गया है"
TEXTS = [
    HINDI,
    "আমার কার্ড হারিয়ে গেছে",
    "என் அட்டை தொலைந்து விட்டது",
    "ఈ కార్డు పోయింది",
    "بِطَاقَتِي ضَاعَت",
    "הַכַּרְטִיס שֶׁלִּי",
    "un cafe\u0301 noir",
    "क\u094d\u200dष ज्ञ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_word_keeps_its_marks(text: str) -> None:
    assert texts.words(text) == unicodedata.normalize("NFC", text)
    assert vocabulary.words(text) == text.split()
    assert all(map(is_of_letters, text.split()))


@pytest.mark.parametrize("text", ["สวัสดีครับ", "ສະບາຍດີ", "မင်္ဂလာပါ", "សួស្តី"])
def test_letters_without_blanks_keep_their_marks(text: str) -> None:
    """The text is one run; each letter with its marks counts as one where no blanks end words."""
    assert texts.words(f"{text}!") == text
    found = vocabulary.words(text)
    assert "".join(found) == text
    assert 1 < len(found) < len(text)
    assert texts.NO_BLANK.search(text)


def test_marks_of_signs_make_no_words() -> None:
    assert re.findall(pattern(), "❤\ufe0f 1\ufe0f\u20e3 a\ufe0f \u0301") == ["1", "a"]


def test_the_end_of_a_text_may_be_a_mark_on_a_letter() -> None:
    assert [ends_in_letter(text) for text in (HINDI, "cafe\u0301", "x", "1", "1\u0301", "है।", "\u0301", "")] == [
        *(True, True, True),
        *(False,) * 5,
    ]


def test_other_vowels_are_another_question() -> None:
    """Split at their marks, both had the same letters: `दिन` (day) and `दीन` (poor) are `द` and `न`."""
    one, other = (sameness.sentences(f"{word} का मतलब बताओ") for word in ("दिन", "दीन"))
    assert texts.words("दिन") != texts.words("दीन")
    assert not sameness.are_worded_alike(one, other)


def test_short_answers_in_hindi_contradict_each_other() -> None:
    """Each had more pieces than a short answer has words."""
    asked = [(1, "भारत की राजधानी क्या है", "नई दिल्ली शहर"), (2, "भारत की राजधानी क्या है", "मुंबई महानगर क्षेत्र")]
    rows = [Row(line, (Turn("user", question), Turn("assistant", answer))) for line, question, answer in asked]
    assert [finding.lines for finding in contradictions.find(Case(rows))] == [[1, 2]]


def test_words_of_a_language_and_of_examples_keep_their_marks() -> None:
    assert languages._WORD.findall(HINDI) == HINDI.split()
    assert choice.nearest(["दिन"], ["दीन है", "दिन है"], 1) == [[1]]
    assert keys.find_meaning(
        {
            "messages": [{"content": "कौन? दीन"}, {"content": "A"}],
            "choices": ["दिन"],
        }
    )
