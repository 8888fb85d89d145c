"""Activation memory of a forward and backward pass, in bytes, by the code path of the trainer's layers.

Counted from what each operation saves for its backward pass. `kept` and `at_work` are of one token in one layer.
"""

from typing import Literal

from tunery.planning.precision import BYTES, Precision
from tunery.planning.shape import Shape
from tunery.spec import Full, Lora, Technique

CHUNK_BYTES = 256 * 2**20
"""Bytes of one loss chunk's fp32 logits. Larger chunks are no faster: the matrix products are large enough."""
LEAST_CHUNK_ROWS = 64
FUSED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Values of a config's model_type whose layers run the trainer's own kernels."""
FUSED_EXPERTS = frozenset({"qwen3_moe"})
"""Those whose layers do so if their experts' adapters, if any, are run by the trainer too."""
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})
_HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text"})
_WIDE = BYTES["float32"]

Path = Literal["fused", "plain", "autocast"]


def find_path(shape: Shape, technique: Technique, precision: Precision) -> Path:
    """Returns which code a layer runs: the trainer's, that of transformers, or that under autocast.

    An unknown family counts as fused, which needs the least memory.
    """
    if precision.autocast:
        return "autocast"
    families = FUSED | {None}
    if shape.unmerged or isinstance(technique, Full):
        families |= FUSED_EXPERTS
    if isinstance(technique, Lora) and technique.use_dora:
        families = frozenset()
    return "fused" if shape.family in families else "plain"


def kept(shape: Shape, technique: Technique, precision: Precision) -> int:
    """Returns the bytes per token that a layer keeps from the forward to the backward pass."""
    path, width, hidden = find_path(shape, technique, precision), BYTES[precision.dense], shape.hidden
    statistics = 2 * _WIDE + _WIDE * shape.heads
    if path == "autocast":
        # The residual stream and what norms make of it in fp32; the inputs of five products, each cast for itself.
        narrow = 5 * hidden + 4 * shape.heads_width + 4 * shape.ffn
        return _WIDE * 4 * hidden + BYTES[precision.compute] * narrow + statistics
    learns = isinstance(technique, Full)
    heads = shape.heads_width + shape.kv_width if shape.family in _HEAD_NORMS else 0
    if path == "fused":
        # Both sums and both norms, query, key, value, attention, gate and up; their product only for its own weight.
        numbers = 4 * hidden + 2 * shape.heads_width + 2 * shape.kv_width + heads + (3 if learns else 2) * shape.ffn
        return width * (numbers + (0 if isinstance(technique, Full) else 7 * technique.r)) + statistics
    # A norm keeps its input in fp32, and its output too where its scale learns; a mask makes keys as wide as queries.
    norms = (4 if shape.family in _FOUR_NORMS else 2) * hidden + heads
    wide = _WIDE * norms * (2 if learns else 1)
    return wide + width * (2 * hidden + 4 * shape.heads_width + 4 * shape.ffn) + statistics


def at_work(shape: Shape, technique: Technique, precision: Precision) -> int:
    """Returns the bytes per token that a layer's backward pass uses beside the kept ones."""
    width = BYTES[precision.dense]
    if find_path(shape, technique, precision) == "fused":
        return width * (3 * shape.hidden + shape.ffn)
    return width * (4 * shape.hidden + 3 * shape.ffn)


def of_loss(shape: Shape, technique: Technique, precision: Precision, labels: int, device: str) -> int:
    """Returns the peak bytes of the head and the loss of `labels` tokens, with the gradient of a trained head."""
    width = BYTES[precision.dense]
    rows = min(labels, chunk_rows(shape.vocab))
    logits = rows * shape.vocab * (width if device == "cuda" else _WIDE)
    states = 3 * labels * shape.hidden * width
    total, product = _head_gradient(shape, technique, precision)
    # A kernel makes the gradient in the logits' place; torch's own operations need as much again, but not for long.
    beside = product if device == "cuda" else max(logits, product)
    return states + logits + total + beside


def chunk_rows(vocab: int) -> int:
    """Returns how many rows a chunk of the loss has."""
    return max(LEAST_CHUNK_ROWS, CHUNK_BYTES // (_WIDE * vocab))


def _head_gradient(shape: Shape, technique: Technique, precision: Precision) -> tuple[int, int]:
    """Returns the bytes of the sum of the chunks' gradients in fp32, and of that sum, or a product of it, in the type
    of the products.
    """
    if not isinstance(technique, Full) and "lm_head" not in (technique.modules_to_save or ()):
        return 0, 0
    weights = shape.vocab * shape.hidden
    return weights * _WIDE, weights * BYTES[precision.compute]
