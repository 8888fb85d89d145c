"""Finds rows that answer the same question differently: with another label, another short answer or a swapped pair."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

from tunery.datasets.report import sameness, texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.neighbours import Pair
from tunery.datasets.report.rows import Row, whole

_SHORT = 5
"""Maximum words of an answer that states one thing."""
_WORD = 2
"""Letters of a word, about, in scripts without blanks between words."""
_HABIT, _FEW = 0.1, 3
"""The share of the questions, and their number, up to which answering one twice is no habit of the file: one that asks
to name a fruit may do so often."""
_OPEN = 3
"""Different answers to one question above which it is open: one that all rows ask, such as to name a fruit."""
_ACTION = "Keep the correct row, and correct or drop the other."


def find(case: Case) -> Iterator[Finding]:
    """Finds pairs of rows with the same instructions: similar questions with different labels, and the same question
    with different short answers or with the preferred and the rejected answer swapped.
    """
    pairs = [pair for pair in case.pairs if not pair.leaked and _same_instructions(pair)]
    swapped = [_Found(pair, *why) for pair in pairs if (why := _swapped(pair))]
    known = {id(one.pair) for one in swapped}
    labelled = [_Found(pair, *why) for pair in pairs if id(pair) not in known and (why := _labels(case, pair))]
    short = [_Found(pair, *why) for pair in pairs if id(pair) not in known and (why := _answers(case, pair))]
    answers = _by_question([*labelled, *short])
    asked = {one.question for one in short}
    if len(asked) > max(_FEW, _HABIT * len(case.compared)):
        short = []
    found = [one for one in [*labelled, *swapped, *short] if len(answers.get(one.question, ())) <= _OPEN]
    judges: list[_Judge] = [_swapped, partial(_labels, case), *([partial(_answers, case)] if short else [])]
    for one in [*found, *_repeated(case, found, judges)]:
        yield _finding(*one)


_Judge = Callable[[Pair], tuple[str, str, str] | None]
"""Returns what both rows have different ones of, and both; None if they do not contradict each other."""


class _Found(NamedTuple):
    """A pair of rows, what they have different ones of, and both."""

    pair: Pair
    what: str
    one: str
    other: str

    @property
    def question(self) -> str:
        return texts.words_and_signs(self.pair.second.question)


def _repeated(case: Case, found: Sequence[_Found], judges: Sequence[_Judge]) -> Iterator[_Found]:
    """Yields the rows that repeat a contradicted one, each with a row that contradicts it: of equal questions, only the
    first is paired with all others."""
    named = {row.line for one in found for row in one.pair[:2]}
    rivals: dict[tuple[str, str | None], dict[str, tuple[Row, float]]] = {}
    for pair in (one.pair for one in found):
        for row, rival in ((pair.first, pair.second), (pair.second, pair.first)):
            for system in (texts.squash(rival.system), None):
                of_question = rivals.setdefault((texts.asked(row.question), system), {})
                of_question.setdefault(f"{rival.tools}{whole(rival)}", (rival, pair.similarity))
    for row in case.compared if rivals else ():
        if row.line not in named:
            systems = dict.fromkeys((texts.squash(row.system) or None, ""))
            some = (rivals.get((texts.asked(row.question), system), {}).values() for system in systems)
            pairs = (Pair(row, rival, similarity, False) for rival, similarity in chain.from_iterable(some))
            why = ((pair, judge(pair)) for pair in pairs if _same_instructions(pair) for judge in judges)
            yield from islice((_Found(pair, *said) for pair, said in why if said), 1)


def _by_question(found: Iterable[_Found]) -> dict[str, set[str]]:
    """Returns the different answers to each question, of pairs that have the same one."""
    answers: dict[str, set[str]] = {}
    for one in found:
        if one.pair.similarity == 1:
            answers.setdefault(one.question, set()).update((one.one, one.other))
    return answers


def _finding(pair: Pair, what: str, one: str, other: str) -> Finding:
    lines = sorted((pair.first.line, pair.second.line))
    asked = "the same question" if pair.similarity == 1 else "nearly the same question"
    why = f"For {asked} {what} is '{one}' in one row and '{other}' in the other."
    return Finding("contradiction", lines, pair.similarity, why, _ACTION)


def _labels(case: Case, pair: Pair) -> tuple[str, str, str] | None:
    """Returns the task and both labels of rows that have different ones."""
    for task in case.tasks:
        one, other = task.labels.get(pair.first.line), task.labels.get(pair.second.line)
        if one is not None and other is not None and one != other and _are_worded_alike(pair):
            return task.name, one, other
    return None


def _are_worded_alike(pair: Pair) -> bool:
    asked = (sameness.sentences(row.question) for row in (pair.first, pair.second))
    return pair.similarity == 1 or sameness.are_worded_alike(*asked)


def _swapped(pair: Pair) -> tuple[str, str, str] | None:
    first, second = pair.first, pair.second
    if not first.rejected or pair.similarity < 1:
        return None
    one, other = texts.squash(first.answer), texts.squash(second.answer)
    swapped = one == texts.squash(second.rejected) and other == texts.squash(first.rejected)
    return ("the preferred answer", _shown(first.answer), _shown(second.answer)) if swapped and one != other else None


def _answers(case: Case, pair: Pair) -> tuple[str, str, str] | None:
    """Returns both answers to the same question, if they are short and state different things."""
    first, second = pair.first, pair.second
    if pair.similarity < 1 or any(first.line in task.labels and second.line in task.labels for task in case.tasks):
        return None
    one, other = (texts.words_and_signs(row.answer).split() for row in (first, second))
    if not (0 < _size(one) <= _SHORT and 0 < _size(other) <= _SHORT) or _adds(one, other) or _adds(other, one):
        return None
    return "the answer", _shown(first.answer), _shown(second.answer)


def _size(words: Sequence[str]) -> float:
    """Returns the number of words, about, also in scripts without blanks between words."""
    return sum(max(1, len(texts.NO_BLANK.findall(word)) / _WORD) for word in words)


def _adds(words: Sequence[str], more: Sequence[str]) -> bool:
    """Whether an answer only says more than another one, which a minus does not."""
    if ("-" in words) != ("-" in more):
        return False
    return {*words} <= {*more} or (texts.NO_BLANK.match(words[0]) is not None and more[0].startswith(words[0]))


def _shown(answer: str) -> str:
    text = " ".join(answer.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same_instructions(pair: Pair) -> bool:
    """Whether two rows have the same tools and system message; one without it, or with wrong roles, counts as the
    same."""
    if pair.first.tools != pair.second.tools:
        return False
    one, other = texts.squash(pair.first.system), texts.squash(pair.second.system)
    return one == other or not one or not other
