"""Computes what fits on a GPU from given measurements, so these tests need no GPU."""

from typing import Any

import pytest
from known_models import LLAMA_8B

from tunery.planning import expected, memory
from tunery.spec import Full, Lora, Qlora, Technique
from worker.trainer.preflight import tokens_in

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LENGTH = 2048


@pytest.mark.parametrize("model_info", [LLAMA_8B, SMOLLM2], ids=["8B", "135M"])
@pytest.mark.parametrize("technique", [Full(), Lora(), Qlora()], ids=["full", "lora", "qlora"])
def test_plan_begins_a_little_above_the_least(model_info: dict[str, Any], technique: Technique) -> None:
    """Devices in between get a probe. The smallest one with a plan recomputes and offloads, one three times as large
    does neither.
    """
    least = memory.estimate(model_info, technique, max_seq_length=LENGTH).bytes
    asked: dict[str, Any] = {"max_seq_length": LENGTH, "batch": 1}
    capacity = next(
        size for size in range(least, 2 * least, 2**26) if expected.runs(model_info, technique, capacity=size, **asked)
    )
    small, large = (expected.run(model_info, technique, capacity=size, **asked) for size in (capacity, 3 * capacity))

    assert not expected.runs(model_info, technique, capacity=least - 1, **asked)
    assert capacity < 1.25 * least
    assert small is not None
    assert large is not None
    assert small.step.recompute
    # A full fine-tune computes its one row while there are no gradients yet, which is room enough.
    assert small.step.offload == (not isinstance(technique, Full))
    assert (large.step.recompute, large.step.offload) == (0, False)
    assert least <= small.estimate.bytes <= capacity


def test_a_full_fine_tune_of_8b_fits_on_80_gib() -> None:
    weights, activations = 8_030_000_000, 400_000  # bf16 weights; activations in bytes a token, with recomputation
    free = 80 * 2**30 - 10**9 - 2 * weights

    assert tokens_in(free, activations, (2 + memory.moment_bytes(Full())) * weights) > 50_000
    assert tokens_in(free - 40 * 2**30, activations, (2 + memory.moment_bytes(Full())) * weights) == 0
