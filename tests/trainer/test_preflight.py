"""What fits on a GPU, reckoned from what was measured: by numbers, as no GPU is needed to reckon."""

from typing import Any

import pytest

from tunery.planning import memory
from tunery.spec import Full, Lora, Qlora, Technique
from worker.trainer.preflight import tokens_in

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LENGTH = 2048


@pytest.mark.parametrize("facts", [LLAMA_8B, SMOLLM2], ids=["8B", "135M"])
@pytest.mark.parametrize("technique", [Full(), Lora(), Qlora()], ids=["full", "lora", "qlora"])
def test_what_the_plan_lets_through_is_not_refused_once_a_gpu_is_held(
    facts: dict[str, Any], technique: Technique
) -> None:
    need = memory.estimate(facts, technique, max_seq_length=LENGTH)
    parts = need.parts
    free = need.bytes - parts["base"] - parts.get("adapter", 0)
    kept = memory.trainable_params(facts, technique) * (2 if isinstance(technique, Full) else 4)
    kept += memory.trainable_params(facts, technique) * memory.moment_bytes(technique)

    assert tokens_in(free, (parts["activations"] + parts["head"]) / LENGTH, kept) >= LENGTH


def test_a_full_fine_tune_of_8b_fits_on_80_gib() -> None:
    weights, activations = 8_030_000_000, 400_000  # bf16, recomputing: bytes a token
    free = 80 * 2**30 - 10**9 - 2 * weights

    assert tokens_in(free, activations, (2 + memory.moment_bytes(Full())) * weights) > 50_000
    assert tokens_in(free - 40 * 2**30, activations, (2 + memory.moment_bytes(Full())) * weights) == 0
