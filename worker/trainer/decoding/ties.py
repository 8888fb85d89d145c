"""Says when rounding decides which of two tokens is the likeliest."""

import math
from typing import Literal

_TIE, _EXACT_TIE = 0.05, 1e-4
"""Gaps of logits within which rounding decides between tokens: with sums in bf16, and in fp32."""
_SPACINGS = 4
"""Gap in neighbouring bf16 numbers within which rounding decides too. From 16 on neighbours are 0.125 apart: of 28
answers of SmolLM2 another batch size changes 9, 4 of them at gaps below 0.05, all within three neighbours
(`python -m bench.rounding`)."""
Precision = Literal["float32", "bfloat16"]


def tie(logit: float, precision: Precision) -> float:
    """Returns how far apart two logits of that size may be for rounding to decide between them."""
    if precision == "float32":
        return _EXACT_TIE
    _, exponent = math.frexp(logit)
    spacing = 2.0 ** (exponent - 8)  # bf16 has eight significant bits
    return max(_TIE, _SPACINGS * spacing)
