"""Whether an answer's last word goes on, by a base's probabilities."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tunery.rows.template import ChatTemplate
from worker.trainer.answer_ends import AnswerEnds

TOKENS = [
    "a",
    " ne",
    "ed",
    " need",
    " needed",
    " needy",
    " needn't",
    "eds",
    "s",
    ".",
    ". ",
    "\n",
    "?",
    " so",
    "2",
    "<end>",
]
ID = {token: at for at, token in enumerate(TOKENS)}


def ends() -> AnswerEnds:
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer.decoder = decoders.Fuse()
    return AnswerEnds(ChatTemplate(tokenizer, {"default": "{{ messages }}"}, {}, [ID["<end>"]]))


def goes_on(answer: Sequence[int], likely: torch.Tensor) -> float | None:
    said = ends().judge(7, answer, likely)
    assert (said.line, said.end) == (7, pytest.approx(math.log(ENDS), abs=1e-4))
    return said.goes_on


def likely(*rows: Mapping[str, float]) -> torch.Tensor:
    """Returns the log probabilities of each place; the rest of one is shared by the other tokens."""
    table = torch.zeros(len(rows), len(TOKENS))
    for at, row in enumerate(rows):
        table[at] = (1 - sum(row.values())) / max(1, len(TOKENS) - len(row))
        for token, share in row.items():
            table[at, ID[token]] = share
    return table.log()


AFTER = {
    "a": 0.05, "ed": 0.1, "eds": 0.02, "s": 0.03,
    ".": 0.1, ". ": 0.02, "?": 0.03, "\n": 0.04, "<end>": 0.01,
    " ne": 0.1, " need": 0.1, " needed": 0.1, " needy": 0.1, " needn't": 0.1, " so": 0.05, "2": 0.05,
}  # fmt: skip
GOES_ON, ENDS = 0.2, 0.2


def test_longer_tokens_in_the_place_of_the_last_one_go_on() -> None:
    before = {" need": 0.25, " needed": 0.3, " needy": 0.05, " needn't": 0.02, "a": 0.3}
    found = goes_on([ID["2"], ID[" need"]], likely({}, before, AFTER))
    assert found == pytest.approx(math.log((0.3 + 0.05 + 0.02 + 0.25 * GOES_ON) / (0.25 * ENDS)), abs=1e-4)


def test_a_word_of_several_tokens() -> None:
    first = {" ne": 0.2, " needed": 0.1, " needy": 0.1, " needn't": 0.1, " need": 0.1}
    second = {"ed": 0.5, "eds": 0.2}
    found = goes_on([ID[" so"], ID[" ne"], ID["ed"]], likely({}, first, second, AFTER))
    longer = 0.3 + 0.2 * 0.2 + 0.2 * 0.5 * GOES_ON
    assert found == pytest.approx(math.log(longer / (0.2 * 0.5 * ENDS)), abs=1e-4)


def test_what_ends_with_no_letter_has_no_word_to_go_on() -> None:
    for last in (".", "2", "\n"):
        assert goes_on([ID[" need"], ID[last]], likely({}, {}, AFTER)) is None
    assert goes_on([], likely(AFTER)) is None


def test_a_text_of_letters_alone_is_one_word() -> None:
    found = goes_on([ID["ed"]] * 50, likely(*[{"ed": 0.5, "eds": 0.1}] * 50, AFTER))
    assert found == pytest.approx(math.log((0.1 + 0.5 * GOES_ON) / (0.5 * ENDS)), abs=1e-3)
