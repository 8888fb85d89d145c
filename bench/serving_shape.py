"""A batch of many streams on a CUDA device, on a random model of a large shape: `bench.serving --shape 8b`."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.shop import round_
from tunery.artifacts import manifest
from tunery.storage import Directory
from worker.server.bank import Bank
from worker.server.batch import Batch
from worker.server.cache_memory import CacheMemory
from worker.server.decode_graphs import recorder_for
from worker.server.factors import Factors, Site
from worker.server.streams import Alone
from worker.trainer.rope import LengthRope

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
MIXED, RESIDENT, SWITCHED, ROUNDS = 16, 64, 3, 3
PROMPT, VOCABULARY = 128, 1000
"""Tokens of a prompt, and how many different ones there are."""


def measure(
    streams: int,
    tokens: int,
    rank: int,
    config: Any = LLAMA_8B,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    *,
    graphs: bool = False,
) -> dict[str, Any]:
    """Tokens a second of one stream, MIXED and `streams`, on the base and with an adapter each, and of PEFT's
    `set_adapter`; memory with RESIDENT adapters; seconds until an adapter in local storage can answer."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    bank = Bank(model)
    batch = Batch(model, bank, CacheMemory(32 * 2**30), recorder=recorder_for(model) if graphs else None)
    base_bytes = _allocated(device)
    adapters = [_adapter(model, rank) for _ in range(RESIDENT)]
    for adapter in adapters:
        bank.add(adapter)
    counts = {"one": 1, "mixed": MIXED, "many": streams}
    found = {}
    for name, count in counts.items():
        for suffix, laid in (("", None), ("_adapters", adapters)):
            _write(batch, count, laid, 4)
            found[name + suffix] = round_(median(_write(batch, count, laid, tokens) for _ in range(ROUNDS)))
            print(name + suffix, found[name + suffix], flush=True)
    memory = {"base": base_bytes, "adapter": adapters[0].nbytes, "both": _allocated(device)}
    over = memory["both"] / (base_bytes + RESIDENT * adapters[0].nbytes) - 1 if base_bytes else None
    found["switching"] = round_(_switch(model, rank, tokens))
    return {
        "tokens_per_second": found,
        "many_of_one": round_(found["many"] / found["one"]),
        "many_adapters_of_one": round_(found["many_adapters"] / found["one_adapters"]),
        "mixed_of_base": round_(found["mixed_adapters"] / found["mixed"]),
        "mixed_of_switching": round_(found["mixed_adapters"] / found["switching"]),
        "memory": memory | {"over_base_and_adapters": over and round_(over)},
        "loading_seconds": _load(model, bank, adapters[0].sites, rank),
    }


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _switch(model: Any, rank: int, tokens: int) -> float:
    """Tokens a second of SWITCHED requests, each with an adapter of its own, one after another by PEFT."""
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, lora, adapter_name="0")
    for number in range(1, SWITCHED):
        tuned.add_adapter(str(number), lora)
    tuned.eval()
    begun = 0.0
    for number in range(-1, SWITCHED):  # the first one warms up
        if number == 0:
            begun = time.perf_counter()
        tuned.set_adapter(str(max(0, number)))
        stream = Alone(tuned, [(131 * number + n) % VOCABULARY for n in range(PROMPT)], LengthRope())
        for _ in range(tokens):
            stream.push(int(stream.logits().argmax()))
    seconds = time.perf_counter() - begun
    tuned.unload()
    return SWITCHED * tokens / seconds


def _load(model: Any, bank: Bank, sites: Sequence[Site], rank: int) -> dict[str, float]:
    """Seconds from an adapter in local storage, whose files are checked by their hashes, to one that rows can have."""
    with tempfile.TemporaryDirectory() as root:
        folder, storage = Path(root) / "adapter", Directory(Path(root) / "objects")
        folder.mkdir()
        weights = {}
        for site in sites:
            weights[f"base_model.model.{site.name}.lora_A.weight"] = torch.randn(rank, site.inputs)
            weights[f"base_model.model.{site.name}.lora_B.weight"] = torch.randn(site.outputs, rank)
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
        _, sha256 = manifest.publish(storage, "models/one", folder)
        seconds = []
        for number in range(5):
            begun = time.perf_counter()
            there = Path(root) / str(number)
            manifest.fetch(storage, "models/one", manifest.load(storage, "models/one", sha256), there)
            factors = Factors.read(there, model)
            assert factors is not None
            bank.add(factors)
            factors.flat[:1].tolist()  # type: ignore[index]  # the device has it
            seconds.append(time.perf_counter() - begun)
            bank.remove(factors)
        return {"median": round_(median(seconds)), "worst": round_(max(seconds))}


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
