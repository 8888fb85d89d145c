"""A batch of many streams on a CUDA device, on a random model of a large shape: `bench.serving --shape 8b`."""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.shop import round_
from worker.server.bank import Bank
from worker.server.batch import Batch
from worker.server.cache_memory import CacheMemory
from worker.server.factors import Factors, Site

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
PROMPT, VOCABULARY = 128, 1000
"""Tokens of a prompt, and how many different ones there are."""


def throughput(
    streams: int,
    tokens: int,
    rank: int,
    config: Any = LLAMA_8B,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Tokens a second of one stream and of many, on the base and with an adapter each."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    bank = Bank(model)
    adapters = [_adapter(model, rank) for _ in range(streams)]
    for adapter in adapters:
        bank.add(adapter)
    batch = Batch(model, bank, CacheMemory(32 * 2**30))
    kinds: dict[str, tuple[int, list[Factors] | None]] = {
        "one": (1, None),
        "one_adapter": (1, adapters),
        "many": (streams, None),
        "many_adapters": (streams, adapters),
    }
    found = {}
    for name, (count, laid) in kinds.items():
        _write(batch, count, laid, 4)
        found[name] = round_(_write(batch, count, laid, tokens))
    return {
        "tokens_per_second": found,
        "many_of_one": round_(found["many"] / found["one"]),
        "many_adapters_of_one": round_(found["many_adapters"] / found["one_adapter"]),
    }


def _adapter(model: Any, rank: int) -> Factors:
    layers = {name: layer for name, layer in model.named_modules() if name.endswith("_proj")}
    sites = tuple(Site(name, rank, one.in_features, one.out_features) for name, one in sorted(layers.items()))
    return Factors(sites, torch.randn(sum(site.numel for site in sites), device=model.device) * 0.01)


def _write(batch: Batch, streams: int, adapters: list[Factors] | None, tokens: int) -> float:
    """Tokens a second of greedy rows, once their prompts have been read."""
    prompts = [[(131 * i + n) % VOCABULARY for n in range(PROMPT)] for i in range(streams)]
    rows = [batch.join(ids, adapters and adapters[i], is_greedy=True) for i, ids in enumerate(prompts)]
    for row in rows:
        row.likeliest()  # an answer on the host: the device has ended
    begun = time.perf_counter()
    for _ in range(tokens):
        for row in rows:
            row.push(row.likeliest())
        batch.step()
    seconds = time.perf_counter() - begun
    for row in rows:
        row.close()
    return streams * tokens / seconds
