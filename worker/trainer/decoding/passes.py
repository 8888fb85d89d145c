"""Forward passes of a model over the rows of a cache, for models that use the masks and positions they are given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from worker.trainer import grouped_attention, rope
from worker.trainer.decoding.cache import Cache
from worker.trainer.kernels import attention, cached_attention

BY_LAYER = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "cohere2", "gpt_oss"})
ONE_MASK = frozenset({"llama", "mistral", "mixtral", "qwen3_moe", "phi", "phi3", "granite"})
_PACKED, _ONE_TOKEN = "packed_rows", "one_token"
_PLAIN = frozenset({"sdpa", grouped_attention.NAME})
"""Attention by scores and masks alone. Families whose scores are capped, or have sinks, have another."""


def are_known(model: Any) -> bool:
    """Whether rows of different lengths may share the model's passes: only models known to use given masks and
    positions.
    """
    return model.config.model_type in BY_LAYER | ONE_MASK and not rope.of(model)


def is_plain(model: Any) -> bool:
    """Whether a model's attention is by scores and masks alone, computed without writing all scores."""
    return model.config._attn_implementation in _PLAIN


class Passes:
    """A model's passes over the rows of a cache."""

    def __init__(self, model: Any, cache: Cache) -> None:
        self._model = model
        self._cache = cache

    def step(self, tokens: Tensor, positions: Tensor, reach: int) -> Tensor:
        """Returns the logits [rows, vocabulary] after each of the first rows has read its token [rows, 1], of which
        the first `reach` positions are read.
        """
        self._cache.place_all(positions, reach)
        if not is_plain(self._model):
            return self.read(tokens, positions)
        with attending(self._model, _ONE_TOKEN):
            return self._logits(
                tokens, positions, self._no_mask(positions), logits_to_keep=1, lengths=positions[:, 0] + 1
            )[:, -1]

    def read(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Returns the logits [rows, vocabulary] after the last token of each row of a pass that has been placed."""
        return self._logits(ids, positions, self._each(self._mask), logits_to_keep=1)[:, -1]

    def read_packed(self, rows: Sequence[Sequence[int]], first: int, prefix: int) -> Tensor:
        """Returns the logits [rows, vocabulary] after the last token of rows that are read behind each other, into the
        slots from `first` on, each after the `prefix` positions that the first slot has.
        """
        positions, borders = self._cache.place_packed(first, [len(row) for row in rows], prefix)
        ids = torch.tensor([[token for row in rows for token in row]], device=positions.device)
        assert borders.ends is not None
        with attending(self._model, _PACKED):
            return self._logits(
                ids, positions, self._no_mask(positions), logits_to_keep=borders.ends[1:] - 1, borders=borders
            )[0]

    @property
    def reads_own_keys(self) -> bool:
        """Whether a step reads what its rows have, and not all that they may reach."""
        return is_plain(self._model) and all(cached_attention.available(keys, keys) for keys in self._cache.kinds)

    def _no_mask(self, positions: Tensor) -> Mapping[str, Tensor] | Tensor:
        """Returns masks for attention that does not read them: of four axes, so that transformers passes them on."""
        return self._each(lambda _: positions.new_zeros(1, 1, 1, 1))

    def _logits(self, ids: Tensor, positions: Tensor, masks: Any, **options: Any) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self._cache,
            use_cache=True,
            **options,
        ).logits
        return logits

    def _each(self, mask: Callable[[int | None], Tensor]) -> Mapping[str, Tensor] | Tensor:
        """Returns the masks of a pass, in the form that the model's family reads."""
        config = self._model.config
        window = getattr(config, "sliding_window", None)
        if config.model_type in BY_LAYER:
            return {"full_attention": mask(None), "sliding_attention": mask(window)}
        return mask(window)

    def _mask(self, window: int | None) -> Tensor:
        visible = self._cache.visible(window)
        if is_plain(self._model):
            return visible
        added = torch.zeros(visible.shape, dtype=self._model.dtype, device=visible.device)
        return added.masked_fill(~visible, torch.finfo(added.dtype).min)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Makes a model use an attention function of this name inside the block."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _packed(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, *, scaling: float,
    borders: attention.Borders, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Computes attention of rows behind each other; the signature is that of transformers' attention functions."""
    # In autocast, rotated queries and keys are wider than values.
    query, key, value = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))
    fits = value.dtype != torch.float32 and attention.available(query.shape[-1], sliding_window)
    attend = attention.rows_apart if fits else attention.plain
    return attend(query, key, value, borders, scaling, sliding_window)[None], None


def _one_token(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, *, scaling: float, lengths: Tensor,
    sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Computes attention of a token of each row; the signature is that of transformers' attention functions."""
    tokens = query[:, :, 0].to(value.dtype)  # in autocast, rotated queries are wider than values
    return cached_attention.attend(tokens, key, value, lengths, scaling, sliding_window)[:, None], None


AttentionInterface.register(_PACKED, _packed)
AttentionInterface.register(_ONE_TOKEN, _one_token)
