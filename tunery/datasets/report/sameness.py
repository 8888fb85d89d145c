"""Tells questions that ask the same apart from others that only share a template, an instruction or a context.

Both are similar by their shingles. A question that was typed again has a greeting, a typo or some small words more or
less; another question has other words of content in their place.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from tunery.datasets.report import shingles, texts

_END = re.compile(r"(?<=[.!?:;\u061b\u061f])\s+|\n+|(?<=[\u3002\uff01\uff1a\uff1b\uff1f])")
_LEAST_QUESTIONS, _SHARE, _LEAST_WORDS = 20, 0.2, 3
"""Different questions from which on, the share of them that must have a sentence, and words that it must have, to be an
instruction to all of them. A greeting has fewer words."""
_CONTENT, _LEAST_LETTERS = 4, 2
"""Letters from which on a word may be another one's form, and least letters of a word of content."""
_SHORT_WORDS = """
aan ab al als am an aren att au auf aus aux av avec bei bij bin bis btw ce ces cet che chi ci co con couldn cui czy da
dal dan das dat de del dem den der des det di didn die dir dit do doesn don dos du e een ein el em en er era es esa ese
eso est este et ett euch eux foi fra för für ga gli ha had hadn hai har hasn hat haven hay heb het hey hi hij ho hoe i
ich ihm ihn ihr ik il ile ils im in ins io is isn ist ja jag jak je już kan la las le les leur li ll lo los là ma maar
mal man me med men mes met mi mia mij mijn min mio mir mis mit mon muy na naar nas ne nee nel nie niet no non nos nu
nun nur o ob och od of oh ok okay om on ons ook op os ou où par para pas per più pls plz po por på que qui qué re sa se
sei ser ses shouldn si sie sin się so som son sta su sul sur sus sí są ta te tes thx till to toe toi ton tot tra tu tua
tuo tus ty u uit um uma un una und une uno uns uw van ve vi von vor vos vous war was wasn we wel wer weren wie wij wir
wo won wouldn y ya yo z za ze zij zo zu zum zur ça
"""
"""Words of few letters that say little in German, Spanish, Portuguese, French, Italian, Dutch, Swedish or Polish, and
in chats, and what stands before the apostrophe of `isn't` or after that of `we've`."""
_FUNCTION = {*ENGLISH_STOP_WORDS, *_SHORT_WORDS.split()} - {
    "bill", "computer", "cry", "describe", "detail", "empty", "fill", "find", "fire", "full", "interest", "keep",
    "made", "make", "mill", "mine", "move", "name", "part", "serious", "side", "sincere", "system", "take", "thick",
    "thin", "three", "four", "five", "eight", "nine", "eleven", "twelve", "fifteen", "twenty", "forty", "fifty",
    "sixty", "hundred", "first", "last", "next", "back", "front", "bottom",
}  # fmt: skip
"""Those, and scikit-learn's English stop words, without words that say what is asked."""
_TURNS = """
no not t never none without except less more fewer least most last first before after above below up down on off
nicht kein keine keinen nie ohne mehr weniger pas sans plus moins jamais sin nunca menos non senza mai meno
"""
_TURNING = frozenset(_TURNS.split())
"""Words that turn the meaning of the question that has them: `t` is that of `isn't`."""
_FEW = 0.1
"""The share of the words of content that a long question may have in place of others, and ask the same."""
_ALIKE = 0.75
"""Least share of the longer one of two spellings of a word that they begin and end with."""
_STEM, _STEM_SHARE = 4, 0.55
"""Least letters that two forms of a word begin with, and their least share of the longer one."""
_REST = 0.5
"""Least Jaccard similarity of the shingles of what questions with a common sentence have besides."""
_MOST = 30
"""Maximum words of each question that are compared as spellings."""
_REMEMBERED = 128
"""Questions whose words are kept: in a file made from one template, each is compared with ten others."""


def sentences(text: str) -> list[str]:
    """Returns the words and signs of each sentence and line of a text."""
    return [words for part in _END.split(text) if (words := texts.words_and_signs(part))]


def instructions(questions: Iterable[Sequence[str]]) -> frozenset[str]:
    """Returns the sentences that many of these different questions have, each given by its sentences."""
    counts: Counter[str] = Counter()
    total = 0
    for question in questions:
        total += 1
        counts.update(set(question))
    if total < _LEAST_QUESTIONS:
        return frozenset()
    often = (sentence for sentence, count in counts.items() if count >= _SHARE * total)
    return frozenset(sentence for sentence in often if len(sentence.split()) >= _LEAST_WORDS)


def ask_the_same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether similar questions, given by their sentences, have hardly any words of content in place of others."""
    common = set(one) & set(other)
    here, there = _rest(one, common), _rest(other, common)
    if here.words <= there.words or there.words <= here.words:
        return not _are_exchanged(here.order, there.order)
    if any(len(part.split()) >= _LEAST_WORDS for part in common) and _overlap(here.order, there.order) < _REST:
        return False
    return not _replaces_more(here, there, _is_spelling, _FEW * max(len(here.content), len(there.content)))


def are_worded_alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether similar questions, given by their sentences, differ in nothing that may be the reason for another answer:
    a word in place of another that is no typing error, a sign or a word that turns the meaning, or the order of words.
    """
    common = set(one) & set(other)
    here, there = _rest(one, common), _rest(other, common)
    unshared = here.words ^ there.words
    if _TURNING & unshared or any(map(texts.is_sign, unshared)) or _replaces_more(here, there, _is_typo, 0):
        return False
    shared = here.words & there.words
    return not _are_reordered(*([word for word in part.order if word in shared] for part in (here, there)))


class _Words(NamedTuple):
    """Words in their order, the different ones, and those of content, as signs are."""

    order: Sequence[str]
    words: frozenset[str]
    content: frozenset[str]


def _rest(question: Iterable[str], common: Collection[str]) -> _Words:
    """Returns the words of the sentences that are not common."""
    return _words_of(tuple(part for part in question if part not in common) if common else tuple(question))


@lru_cache(maxsize=_REMEMBERED)
def _words_of(sentences: tuple[str, ...]) -> _Words:
    order = " ".join(sentences).split()
    words = frozenset(order)
    content = frozenset(word for word in words if len(word) >= _LEAST_LETTERS or texts.is_sign(word))
    return _Words(order, words, content - _FUNCTION)


def _are_reordered(words: Sequence[str], others: Sequence[str]) -> bool:
    return words != others and sorted(words) == sorted(others)


def _are_exchanged(words: Sequence[str], others: Sequence[str]) -> bool:
    """Whether up to two words stand in the place of others farther on, and these in theirs: `from Bath to York`."""
    if not _are_reordered(words, others):
        return False
    begin = next(at for at, pair in enumerate(zip(words, others, strict=True)) if pair[0] != pair[1])
    end = next(at for at in range(len(words), 0, -1) if words[at - 1] != others[at - 1])
    one, two = words[begin:end], others[begin:end]
    sizes = ((left, right) for left in (1, 2) for right in (1, 2) if left + right < len(one))
    return any([*one[-right:], *one[left:-right], *one[:left]] == [*two] for left, right in sizes)


_Compare = Callable[[str, str], bool]


def _replaces_more(here: _Words, there: _Words, is_same: _Compare, most: float) -> bool:
    """Whether more than `most` words of content stand in place of others, on both sides."""
    one, other = sorted(here.content - there.words), sorted(there.content - here.words)
    return bool(one and other) and _has_more(one, other, is_same, most) and _has_more(other, one, is_same, most)


def _has_more(words: Sequence[str], others: Sequence[str], is_same: _Compare, most: float) -> bool:
    """Whether more than `most` words are the same as none of the others."""
    unlike, others = 0, others[:_MOST]
    for word in words[:_MOST]:
        for other in others:
            if is_same(word, other):
                break
        else:
            unlike += 1
            if unlike > most:
                return True
    return False


def _overlap(one: Sequence[str], other: Sequence[str]) -> float:
    both = " ".join(one), " ".join(other)
    here, there = ({text[at : at + shingles.SHINGLE] for at in range(len(text))} for text in both)
    return len(here & there) / len(here | there)


def _is_typo(word: str, other: str, least: int = _CONTENT) -> bool:
    """Whether words differ in one letter or in the order of two. With another letter, a word of less than `least` is
    another word, and so is what has no blanks between its words."""
    _, one, two = _difference(word, other)
    if texts.NO_BLANK.search(word):
        return not one or not two
    is_swapped = len(one) == 2 and one == two[::-1]
    return is_swapped or (max(len(one), len(two)) <= 1 and (len(one) != len(two) or len(word) >= least))


def is_misspelt(word: str, other: str) -> bool:
    """Whether one of two words that are not short is the other with a typing error in its letters."""
    is_long = min(len(word), len(other)) >= _CONTENT
    return is_long and texts.numbers(word) == texts.numbers(other) and _is_typo(word, other)


def _is_spelling(word: str, other: str) -> bool:
    """Whether words differ in one letter, in the order of two, or in little of their length, or have one stem."""
    if word[0] != other[0] and word[-1] != other[-1]:
        return False
    longest = max(len(word), len(other))
    if longest < _CONTENT or texts.NO_BLANK.search(word):
        return _is_typo(word, other, _LEAST_LETTERS + 1)
    start, one, two = _difference(word, other)
    has_one_stem = start >= max(_STEM, _STEM_SHARE * longest)
    return has_one_stem or longest - max(len(one), len(two)) >= _ALIKE * longest or _is_typo(word, other)


def _difference(word: str, other: str) -> tuple[int, str, str]:
    """Returns how many letters the words begin with, and what each has between their common beginning and end."""
    shorter = min(len(word), len(other))
    start = next((at for at in range(shorter) if word[at] != other[at]), shorter)
    rest = shorter - start
    end = next((at for at in range(rest) if word[-1 - at] != other[-1 - at]), rest)
    return start, word[start : len(word) - end], other[start : len(other) - end]
