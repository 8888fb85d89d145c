"""The sources of an answer's logits: forward passes of its own, or a row of a batch."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES

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
        self._model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._memory = memory
        self._nbytes = 0
        self._seen = list(prompt_ids)
        self._unread = len(self._seen)
        self._cache: dict[str, Any] = {}
        self._rope = rope

    def likeliest(self) -> int:
        return int(self.logits().argmax())

    # Here and not around the loop: the mode is per thread, and a generator may continue in another one.
    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        out = self._model(**self._inputs())
        self._cache = {name: out[name] for name in ALL_CACHE_NAMES if name in out}
        if self._memory is not None:
            self._nbytes = _nbytes(self._cache)
            self._memory.reserve(self, self._nbytes, must=True)
        logits: torch.Tensor = out.logits[0, -1].float().cpu()
        if not logits.max().isfinite():
            raise NoProbabilities
        return logits

    def _inputs(self) -> dict[str, Any]:
        """Returns the arguments of the next pass, those of `generate`: families differ in what they need of positions
        and masks, and in the name of their cache.
        """
        ids = torch.tensor([self._seen], device=self._model.device)
        given: dict[str, Any] = {"use_cache": True, "is_first_iteration": not self._cache, **self._cache}
        if "position_ids" in inspect.signature(self._model.forward).parameters:
            given["position_ids"] = torch.arange(len(self._seen), device=ids.device)[None]
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=self._unread if self._cache else None, **given
        )
        return {**inputs, "logits_to_keep": 1}

    def push(self, token: int) -> None:
        self._seen.append(token)
        self._unread = 1
        if self._rope.changes(len(self._seen) - 1, len(self._seen)):
            self._cache = {}  # its keys were rotated by other frequencies

    def fits(self) -> bool:
        """Whether the memory has room for the keys and values; if not, they are freed and computed again later."""
        if self._memory is None or self._memory.reserve(self, self._nbytes):
            return True
        self.close()
        return False

    def close(self) -> None:
        self._cache = {}
        if self._memory is not None:
            self._memory.forget(self)


def _nbytes(part: Any) -> int:
    """Returns the bytes of the tensors in a cache: keys and values of layers, or the states of a recurrent model."""
    return sum(tensor.nbytes for tensor in _tensors(part))


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    for inner in _parts(part):
        yield from _tensors(inner)


def _parts(part: Any) -> Iterable[Any]:
    if isinstance(part, dict):
        return part.values()
    if isinstance(part, list | tuple):
        return part
    return vars(part).values() if isinstance(part, Cache | CacheLayerMixin | LinearAttentionCacheLayerMixin) else ()
