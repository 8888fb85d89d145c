"""Measures one long prompt beside many short ones, in passes shared by all rows and in passes of its own.

    python -m bench.long_row OUT.json [--shape 135m|8b] [--device cuda]

Random weights: neither the time nor the memory depends on them.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import service
from bench.serving_shape import LLAMA_8B, prompt, step
from worker.server.batch import Batch
from worker.server.cache_memory import CacheMemory

SHAPES = {
    "8b": LLAMA_8B,
    "135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65_536,
        tie_word_embeddings=True,
    ),
}
SHORT, ROWS = 100, 16
APART = {"together": 10**9, "apart": None}
"""The number of tokens from which a row has passes of its own; None: the server's choice."""


def measure(model: Any, long_tokens: int | None, longest: int, steps: int) -> dict[str, Any]:
    """Returns the seconds of the fastest step of all rows together, and the memory of their keys and values."""
    batch = Batch(model, None, CacheMemory(64 * 2**30), long_tokens=long_tokens)
    lengths = [longest, *[SHORT] * (ROWS - 1)]
    rows = [batch.join(prompt(i, length), is_greedy=True) for i, length in enumerate(lengths)]
    for row in rows:
        row.likeliest()
    taken = []
    for _ in range(steps):
        begun = time.perf_counter()
        step(batch, rows)
        taken.append(time.perf_counter() - begun)
    return {"seconds_a_step": round(min(taken), 4), "mebibytes": round(batch.nbytes / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(SHAPES[options.shape], dtype=dtype).eval()
    found: dict[str, Any] = service.hardware() | {"load": os.getloadavg(), "shape": options.shape, "rows": ROWS}
    found |= {"device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu"}
    for length in options.lengths:
        found[str(length)] = {name: measure(model, tokens, length, options.steps) for name, tokens in APART.items()}
        print(length, found[str(length)], flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
