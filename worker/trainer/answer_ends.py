"""Judges by a base's probabilities whether an answer ends, or goes on inside its last word."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile

import torch

from tunery.rows.answer_losses import AnswerEnd
from tunery.rows.template import ChatTemplate

_END = re.compile(r"\s*(?:[.!?。！？]|\n)")  # noqa: RUF001 (they are of other scripts)


class AnswerEnds:
    """Knows the tokens with which an answer, a sentence or a line ends, and those with which a word goes on."""

    def __init__(self, template: ChatTemplate) -> None:
        self._texts = _texts(template)
        self._sorted = sorted(range(len(self._texts)), key=self._texts.__getitem__)
        ends = {token for token, text in enumerate(self._texts) if _END.match(text)}
        self._ends = torch.tensor(sorted(ends | template.eos_ids))
        self._letters = self._longer("")

    def judge(self, line: int, answer: Sequence[int], likely: torch.Tensor) -> AnswerEnd:
        """Returns what the base says of an answer's end. `answer`: its ids without the end; `likely`: the log
        probabilities of each of these, and of what follows them."""
        end = likely[-1, self._ends].logsumexp(0)
        goes_on = self._goes_on(answer, likely)
        return AnswerEnd(line=line, end=float(end), goes_on=None if goes_on is None else float(goes_on - end))

    def _goes_on(self, answer: Sequence[int], likely: torch.Tensor) -> torch.Tensor | None:
        """Returns the log probability that the last word goes on, relative to that of its tokens; None without one.

        A tokenizer rarely splits "needed" into "need" and "ed", so longer tokens in the place of the last ones count.
        """
        texts = [self._texts[token] for token in answer]
        letters = len(list(takewhile(str.isalpha, reversed("".join(texts)))))
        if not letters:
            return None
        first = len(texts)
        while letters > 0:
            first -= 1
            letters -= len(texts[first])
        instead, so_far = [], torch.zeros(())
        for at in range(first, len(texts)):
            instead.append(so_far + self._total(likely[at], self._longer("".join(texts[at:]))))
            so_far = so_far + likely[at, answer[at]]
        after = self._total(likely[-1], self._letters)
        return torch.stack([*(one - so_far for one in instead), after]).logsumexp(0)

    def _longer(self, start: str) -> list[int]:
        """Returns the tokens that begin with this text, followed by a letter."""
        first = bisect_left(self._sorted, start, key=self._texts.__getitem__)
        same = takewhile(lambda token: self._texts[token].startswith(start), self._sorted[first:])
        return [token for token in same if self._texts[token][len(start) : len(start) + 1].isalpha()]

    @staticmethod
    def _total(likely: torch.Tensor, ids: list[int]) -> torch.Tensor:
        return likely[ids].logsumexp(0) if ids else torch.tensor(-torch.inf)


def _texts(template: ChatTemplate) -> list[str]:
    """Returns the text of each token inside a text, where its blank is kept."""
    tokenizer = template.tokenizer
    before = tokenizer.encode("a", add_special_tokens=False).ids[-1]
    known = range(max(tokenizer.get_vocab().values()) + 1)
    texts = tokenizer.decode_batch([[before], *([before, token] for token in known)], skip_special_tokens=False)
    return [text.removeprefix(texts[0]) for text in texts[1:]]
