"""The runs that bench/memory.py measures: shapes of bases, and what is trained on them.

On a GPU the kinds with the fewest records come first, so that a bench that is cut off has measured those.
"""

from dataclasses import dataclass, field
from typing import Any

from tunery.spec import Dpo, Full, Lora, MethodOptions, Qlora, Supervised, Technique

_ATTENTION = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
_SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 49152}
_SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
_BILLION = _ATTENTION | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
_EXPERTS = {"moe_intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 2, "num_local_experts": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-82m-untied": {"model_type": "llama", **_SMALL},
    "llama-57m-tied": {"model_type": "llama", **_SMALL, "tie_word_embeddings": True},
    "qwen3-moe-104m": {"model_type": "qwen3_moe", **_SMALL, **_EXPERTS, "num_hidden_layers": 4},
    "gemma3-57m": {"model_type": "gemma3_text", **_SMALL, "tie_word_embeddings": True},
    "llama-1b-untied": {"model_type": "llama", **_BILLION},
    "qwen3-1b-tied": {"model_type": "qwen3", **_BILLION, "tie_word_embeddings": True},
    "qwen3-moe-1b": {"model_type": "qwen3_moe", **_BILLION, **_EXPERTS, "num_hidden_layers": 8},
    "gemma3-1b": {"model_type": "gemma3_text", **_BILLION, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Kind:
    """One run: rows of about `words` tokens, `batch` a step. `scores`: it answers a test file before and after."""

    shape: str
    technique: Technique
    method: MethodOptions = field(default_factory=Supervised)
    words: int = 250
    batch: int = 4
    steps: int = 3
    gpus: int = 1
    sharding: str = "auto"
    scores: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_WIDE = Full(weights_dtype="float32")
_EIGHT_BITS = {"optimizer": "adamw_8bit"}
CPU_KINDS = {
    "cpu lora": Kind("llama-82m-untied", Lora()),
    "cpu lora tied": Kind("llama-57m-tied", Lora()),
    "cpu qlora": Kind("llama-82m-untied", Qlora(compute_dtype="float32")),
    "cpu full": Kind("llama-82m-untied", Full()),
    "cpu full tied": Kind("llama-57m-tied", Full()),
    "cpu full scored": Kind("llama-57m-tied", Full(), scores=True),
    "cpu lora long": Kind("llama-82m-untied", Lora(), words=1500, batch=2),
    "cpu lora moe": Kind("qwen3-moe-104m", Lora()),
    "cpu full moe": Kind("qwen3-moe-104m", Full()),
    "cpu dora": Kind("llama-82m-untied", Lora(use_dora=True)),
    "cpu lora gemma": Kind("gemma3-57m", Lora()),
    "cpu full 8-bit": Kind("llama-82m-untied", Full(), options=_EIGHT_BITS),
    "cpu lora 8-bit": Kind("llama-82m-untied", Lora(), options=_EIGHT_BITS),
    "cpu lora pairs": Kind("llama-82m-untied", Lora(), Dpo(), words=120),
}
GPU_KINDS = {
    "lora moe": Kind("qwen3-moe-1b", Lora(), words=1000),
    "full moe": Kind("qwen3-moe-1b", Full(), words=1000),
    "dora": Kind("llama-1b-untied", Lora(use_dora=True), words=1000),
    "lora 8-bit": Kind("llama-1b-untied", Lora(r=256), words=1000, options=_EIGHT_BITS),
    "lora pairs": Kind("llama-1b-untied", Lora(), Dpo(), words=500),
    "lora scored": Kind("llama-1b-untied", Lora(), words=200, scores=True),
    "full scored": Kind("qwen3-1b-tied", Full(), words=200, scores=True),
    "full tied": Kind("qwen3-1b-tied", Full(), words=1000),
    "qlora tied": Kind("qwen3-1b-tied", Qlora(), words=1000),
    "full fp32 8-bit": Kind("llama-1b-untied", _WIDE, words=1000, options=_EIGHT_BITS),
    "full pairs": Kind("qwen3-1b-tied", Full(), Dpo(), words=500),
    "lora gemma": Kind("gemma3-1b", Lora(), words=1000),
    "lora 8k rows": Kind("llama-1b-untied", Lora(), words=8000, batch=1, options={"max_seq_length": 16_384}),
    "lora tied": Kind("qwen3-1b-tied", Lora(), words=1000),
    "qlora one row": Kind("llama-1b-untied", Qlora(), words=1000, batch=1),
    "full fp32": Kind("llama-1b-untied", _WIDE, words=1000),
    "lora": Kind("llama-1b-untied", Lora(), words=1000),
    "qlora": Kind("llama-1b-untied", Qlora(), words=1000),
    "full": Kind("llama-1b-untied", Full(), words=1000),
    "lora, two GPUs": Kind("llama-1b-untied", Lora(), words=1000, gpus=2, sharding="replicate"),
    "full, two GPUs": Kind("llama-1b-untied", Full(), words=1000, gpus=2, sharding="replicate"),
    "full in pieces": Kind("llama-1b-untied", Full(), words=1000, gpus=2, sharding="full_shard"),
    "qlora in pieces": Kind("llama-1b-untied", Qlora(), words=1000, gpus=2, sharding="full_shard"),
}
KINDS = CPU_KINDS | GPU_KINDS
