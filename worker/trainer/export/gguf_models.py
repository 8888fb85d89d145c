"""The models that GGUF supports: their settings by GGUF's names, and tensors that it stores differently.

Each family states what llama.cpp computes for it. A config that needs something else is refused: the file would load
but answer wrongly.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from worker.trainer.export.errors import NoGguf

Array = NDArray[Any]
BASE_FIELD = "tunery.base_weights_sha256"
_YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
"""YaRN's defaults; llama.cpp has the same."""


@dataclass(frozen=True)
class Family:
    """One of GGUF's architectures.

    `permutes`: the rows of q and k are stored for rotating neighbours, not halves. `norm_offset`: added to the norms'
    weights. `swa_pattern`: every n-th layer, counted from 1, is a global one; None: all are.
    """

    arch: gguf.MODEL_ARCH
    activation: str = "silu"
    permutes: bool = False
    norm_offset: float = 0.0
    swa_pattern: int | None = None
    settings: Callable[[GGUFWriter, Any], None] = lambda _writer, _config: None

    @property
    def name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]


def find(config: Any) -> Family:
    """Returns the family of a model's config. Raises NoGguf."""
    if config.model_type not in FAMILIES:
        raise NoGguf(
            reason=f"the architecture '{config.model_type}' is not supported; supported are {', '.join(FAMILIES)}."
        )
    family = FAMILIES[config.model_type]
    found = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if found != family.activation:
        raise NoGguf(
            reason=f"llama.cpp uses {family.activation} for '{config.model_type}', but this model has {found}."
        )
    _check_layers(family, config)
    return family


def _check_layers(family: Family, config: Any) -> None:
    pattern, layers = family.swa_pattern, getattr(config, "layer_types", None) or []
    wanted = [
        "sliding_attention" if pattern and (number + 1) % pattern else "full_attention" for number in range(len(layers))
    ]
    if pattern and layers != wanted:
        raise NoGguf(
            reason=f"llama.cpp makes every layer whose number is divisible by {pattern} global, but this model has "
            "another pattern."
        )


def describe(writer: GGUFWriter, family: Family, config: Any) -> None:
    """Writes the config by GGUF's names. Raises NoGguf."""
    writer.add_context_length(_context(family, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(int(head_width(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    _scale_rope(writer, rope)
    family.settings(writer, config)


def head_width(config: Any) -> int:
    """Returns the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(family: Family, config: Any) -> int:
    """Returns the context length; if all layers have a window, the window, which llama.cpp would ignore."""
    window = None if family.swa_pattern else getattr(config, "sliding_window", None)
    longest: int = config.max_position_embeddings
    return min(longest, window) if window else longest


def _rope(config: Any) -> dict[str, Any]:
    """Returns RoPE's settings, those of global layers if there are two kinds."""
    found: dict[str, Any] = dict(config.rope_parameters)
    return dict(found["full_attention"]) if "full_attention" in found else found


def _scale_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn" and all(rope.get(name) in (None, usual) for name, usual in _YARN.items()):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):  # llama3's are a tensor
        raise NoGguf(reason=f"its RoPE scaling '{kind}' has settings that the exporter does not support.")


def describe_base(writer: GGUFWriter, weights_sha256: dict[str, str]) -> None:
    """Writes the digests of the weight files of the base that the file was made from, or is applied to."""
    writer.add_string(BASE_FIELD, json.dumps(weights_sha256, sort_keys=True))


def made_tensors(config: Any) -> Iterator[tuple[str, Array]]:
    """Yields the tensors that GGUF has instead of settings."""
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3(rope, head_width(config))


def _llama3(rope: dict[str, Any], width: int) -> Array:
    """Returns the divisor of each frequency: 1 for short waves, `factor` for long ones, and a mixture in between."""
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    fraction = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - fraction) / rope["factor"] + fraction), dtype=np.float32)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    _check_scale(config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    _check_scale(config)
    if config.attn_logit_softcapping or config.final_logit_softcapping or config.use_bidirectional_attention:
        raise NoGguf(reason="llama.cpp supports neither soft caps nor bidirectional attention in Gemma 3.")
    writer.add_sliding_window(config.sliding_window)
    local = config.rope_parameters["sliding_attention"]
    if local["rope_type"] != "default":
        raise NoGguf(reason="the RoPE of its local layers is scaled, which llama.cpp does not support.")
    writer.add_rope_freq_base_swa(local["rope_theta"])


def _check_scale(config: Any) -> None:
    """Raises NoGguf for an unexpected scale. llama.cpp recognises the 27B models, which differ, by their layers."""
    is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    wanted = config.hidden_size // config.num_attention_heads if is_27b else head_width(config)
    if config.query_pre_attn_scalar != wanted:
        raise NoGguf(
            reason=f"llama.cpp scales attention scores by {wanted}, but this model by {config.query_pre_attn_scalar}."
        )


def _phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "gemma": Family(gguf.MODEL_ARCH.GEMMA, "gelu_pytorch_tanh", norm_offset=1.0),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", norm_offset=1.0, swa_pattern=2, settings=_gemma2),
    "gemma3_text": Family(
        gguf.MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", norm_offset=1.0, swa_pattern=6, settings=_gemma3
    ),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, settings=_phi3),
}
"""By transformers' `model_type`."""
