"""Answers that no batch can hold have the logits of whole rows, whatever a family needs of positions and caches."""

from typing import Any

import pytest
import torch
import transformers
import zoo

from worker.server.cache_memory import CacheMemory
from worker.server.streams import Alone
from worker.trainer.rope import LengthRope

MAMBA: dict[str, Any] = {"state_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bamba": {  # its first layers count no positions
        "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "attn_layer_indices": [1], "mamba_n_groups": 1,
    },
    "Mamba": MAMBA,  # its cache has another name
    "Mamba2": MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "RecurrentGemma": {  # its layers keep their states
        "lru_width": 64, "head_dim": 16, "attention_window_size": 16, "num_hidden_layers": 3,
    },
    "OpenAIGPT": {},  # it has no cache
    "Bloom": {},
}  # fmt: skip
PROMPT = [3 + (7 * i) % 250 for i in range(29)]


def made(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(**zoo.SIZE | FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, tensor in model.state_dict().items():
            zoo.fill(name, tensor)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_whole_rows(family: str) -> None:
    model, ids = made(family), [*PROMPT, *range(50, 58)]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(PROMPT) - 1 : -1]

    stream, found = Alone(model, PROMPT, LengthRope()), []
    for token in ids[len(PROMPT) :]:
        found.append(stream.logits())
        stream.push(token)

    assert (torch.stack(found) - wanted).norm() < 1e-4 * wanted.norm()


def test_states_of_recurrent_models_are_counted() -> None:
    memory = CacheMemory(2**20)
    stream = Alone(made("Mamba"), PROMPT, LengthRope(), memory)

    stream.logits()

    layers, channels, state, window = 2, 96, 8, 4
    assert memory.nbytes == layers * channels * (state + window) * 4
