"""Attention of one token a row over cached keys, without repeating the keys that query heads share."""

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Returns the same as transformers' `sdpa`, up to rounding: rows x tokens x heads x width.

    Given a mask, that repeats keys and values for each query head, in every pass. Heads that share keys also share the
    mask of their only token, so they can be passed as tokens of one head.
    """
    rows, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    if tokens != 1 or heads == key_heads:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    together = query.reshape(rows, key_heads, heads // key_heads, width)
    out = functional.scaled_dot_product_attention(
        together, key, value, attention_mask, options.get("dropout", 0.0), scale=options.get("scaling")
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


def use(model: Any) -> None:
    """Lets a model that attends by `sdpa` attend by `attend`."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
