"""Generates one answer token by token: prompt ids in, text out.

This is a separate loop instead of `generate()`: it can stop after any token without a second thread, it shares forward
passes with other answers (`Stream`), it reads no sampling defaults from the model's folder (the request has them all),
and a seed has its own generator instead of the process's.
Greedy answers are the same as those of `generate(do_sample=False)`, which the tests check.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from worker.server.answer import TokenChance
from worker.server.sampling import Sampling
from worker.server.streams import Stream
from worker.server.text import WrittenAnswer, spell

if TYPE_CHECKING:
    from worker.server.grammar import Grammar


@dataclass(kw_only=True, eq=False)
class Generation(WrittenAnswer):
    """An answer whose tokens are chosen here from a stream's logits.

    If `top_logprobs` is a number, `chances` has each token of the answer with as many of the likeliest tokens.
    `is_greedy`: each token is the stream's likeliest, and no logits are read.
    """

    stream: Stream
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    is_greedy: bool = False
    grammar: "Grammar | None" = None
    top_logprobs: int | None = None

    def close(self) -> None:
        """Frees the stream and the model."""
        try:
            self.stream.close()
        finally:
            self.on_close()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return self.stream.cached_tokens

    def tokens(self) -> Iterator[int]:
        dice = _dice(self.sampling.seed)
        for left in reversed(range(self.max_tokens)):
            token = self.stream.likeliest() if self.is_greedy else self._choose(dice)
            if left:
                # Before the token is yielded: a stream that waits for it then shares the next pass with the others,
                # while one that gets it only when the next piece is read would need a pass of its own.
                self.stream.push(token)
            yield token
            if self.grammar is not None:
                self.grammar.take(token)
                if self.grammar.is_complete:
                    self.finish_reason = "stop"
                    return

    def _choose(self, dice: torch.Generator) -> int:
        logits = self.stream.logits()
        token = choose(logits if self.grammar is None else self.grammar.allow(logits), self.sampling, dice)
        self._note(token, logits)
        return token

    def _note(self, token: int, logits: torch.Tensor) -> None:
        """Records the token's log probability if requested. The stop token does not belong to the answer."""
        if self.top_logprobs is None or token in self.eos_ids:
            return
        every = logits.log_softmax(dim=-1)
        values, likeliest = every.topk(min(self.top_logprobs, len(every)))
        top = tuple(map(self._chance, likeliest.tolist(), values.tolist()))
        self.chances.append(replace(self._chance(token, float(every[token])), top=top))

    def _chance(self, token: int, logprob: float) -> TokenChance:
        return TokenChance(spell(self.tokenizer, token), logprob)


def _dice(seed: int | None) -> torch.Generator:
    dice = torch.Generator()
    if seed is None:
        dice.seed()
    else:
        dice.manual_seed(seed % 2**63)  # torch takes 64 bits, JSON has integers of any size
    return dice


def choose(logits: torch.Tensor, sampling: Sampling, dice: torch.Generator) -> int:
    """Returns the likeliest token at temperature 0, else one drawn from the smallest set that has `top_p` of the mass.

    Nucleus sampling as in Holtzman et al. 2020 (arXiv:1904.09751): the likeliest token is always in the set.
    """
    if sampling.is_greedy:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=dice)])
