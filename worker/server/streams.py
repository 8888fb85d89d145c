"""Where an answer's logits come from: a forward pass of its own, or a row of a batch."""

from typing import Any, Protocol

import torch

from worker.trainer.rope import LengthRope


class Stream(Protocol):
    """The logits after a prompt and the tokens that were pushed. `likeliest` or `logits`, and `push`, alternate.

    A greedy stream, of which `likeliest` alone is read, may have no logits.
    """

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed, since their keys and values were there."""

    def likeliest(self) -> int:
        """The likeliest next token."""

    def logits(self) -> torch.Tensor:
        """Logits of the next token (vocabulary, fp32, on the CPU)."""

    def push(self, token: int) -> None:
        """Takes the token that was chosen."""

    def close(self) -> None:
        """Frees the keys and values."""


class Alone:
    """A stream with forward passes of its own, for models and adapters that no batch can hold."""

    cached_tokens = 0

    def __init__(self, model: Any, prompt_ids: list[int], rope: LengthRope) -> None:
        self._model = model
        self._seen = list(prompt_ids)
        self._ids = self._seen
        self._cache: Any = None
        self._rope = rope

    def likeliest(self) -> int:
        return int(self.logits().argmax())

    # Here and not around the loop: the mode belongs to a thread, and a generator may go on in another one.
    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        batch = torch.tensor([self._ids], device=self._model.device)
        out = self._model(input_ids=batch, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[0, -1].float().cpu()
        return logits

    def push(self, token: int) -> None:
        self._seen.append(token)
        self._ids = [token]
        if self._rope.changes(len(self._seen) - 1, len(self._seen)):
            self._ids, self._cache = self._seen, None  # the cache's keys were turned by other frequencies

    def close(self) -> None:
        self._cache = None
