"""The sources of an answer's logits: forward passes of its own, or a row of a batch."""

from typing import Any, Protocol

import torch

from tunery.errors import TuneryError
from worker.server.cache_memory import CacheMemory
from worker.trainer.rope import LengthRope


class NoProbabilities(TuneryError):
    """The model's weights have numbers that are not finite, so no token can be chosen. Train or import it again."""

    code = "no_probabilities"


class Stream(Protocol):
    """The logits after a prompt and the pushed tokens. Calls of `likeliest` or `logits` alternate with `push`.

    A greedy stream, of which only `likeliest` is read, may have no logits.
    """

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed, as their keys and values were reused."""

    def likeliest(self) -> int:
        """Returns the likeliest next token. Raises NoProbabilities, as `logits` does."""

    def logits(self) -> torch.Tensor:
        """Returns the next token's logits (vocabulary, fp32, on the CPU)."""

    def push(self, token: int) -> None:
        """Appends the chosen token."""

    def close(self) -> None:
        """Frees the keys and values."""


class Alone:
    """A stream with forward passes of its own, for models and adapters that no batch can hold."""

    cached_tokens = 0

    def __init__(self, model: Any, prompt_ids: list[int], rope: LengthRope, memory: CacheMemory | None = None) -> None:
        """`memory`: counts the keys and values."""
        self._model = model
        self._memory = memory
        self._nbytes = 0
        self._seen = list(prompt_ids)
        self._ids = self._seen
        self._cache: Any = None
        self._rope = rope

    def likeliest(self) -> int:
        return int(self.logits().argmax())

    # Here and not around the loop: the mode is per thread, and a generator may continue in another one.
    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        batch = torch.tensor([self._ids], device=self._model.device)
        out = self._model(input_ids=batch, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        if self._memory is not None:
            self._nbytes = _nbytes(self._cache)
            self._memory.reserve(self, self._nbytes, must=True)
        logits: torch.Tensor = out.logits[0, -1].float().cpu()
        if not logits.max().isfinite():
            raise NoProbabilities
        return logits

    def push(self, token: int) -> None:
        self._seen.append(token)
        self._ids = [token]
        if self._rope.changes(len(self._seen) - 1, len(self._seen)):
            self._ids, self._cache = self._seen, None  # the cache's keys were rotated by other frequencies

    def fits(self) -> bool:
        """Whether the memory has room for the keys and values; if not, they are freed and computed again later."""
        if self._memory is None or self._memory.reserve(self, self._nbytes):
            return True
        self.close()
        self._ids = self._seen
        return False

    def close(self) -> None:
        self._cache = None
        if self._memory is not None:
            self._memory.forget(self)


def _nbytes(cache: Any) -> int:
    parts = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    return sum(part.nbytes for part in parts if part is not None)
