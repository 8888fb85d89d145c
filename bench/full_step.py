"""Measures what a step of a full fine-tune costs, by the precision of its weights.

`python -m bench.full_step OUT.json [options]`: a random Llama of 1.5 billion weights, made in memory; the same
micro-batch at every step. Tunery's two precisions are compared with bitsandbytes' own 8-bit AdamW, which rounds bf16
weights to nearest, and with stochastic rounding by bitsandbytes' kernel in place of Tunery's own. Needs a GPU.
`moved`: the fraction of one layer's weights that the steps changed, at a rate of 2e-5.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.make_model import SHAPES
from bench.train_rows import rows
from bench.train_side_by_side import hardware
from tunery.planning.precision import decide
from tunery.spec import Full, Plan
from worker.trainer.cuda_graphs import forward_backward
from worker.trainer.data import collate, singles
from worker.trainer.kernels import adamw
from worker.trainer.objective import Objective
from worker.trainer.precision import dtype
from worker.trainer.recipes.full import FULL
from worker.trainer.recipes.recipe import groups

ARMS = {
    "nearest": Full(),
    "stochastic": Full(),
    "stochastic, bitsandbytes": Full(),
    "fp32 masters": Full(weights_dtype="float32"),
}
RATE = 2e-5
AGREES = adamw.agrees


def build(shape: str, kind: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False, dtype=kind,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(kind)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)


def measure(arm: str, a: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of an arm: medians over the steps after the first three."""
    device = torch.device("cuda")
    technique = ARMS[arm]
    adamw.agrees = (lambda _device: False) if arm == "stochastic, bitsandbytes" else AGREES
    precision = decide(technique, "cuda")
    objective = Objective(FULL.prepare(build(a.shape, dtype(precision.trained), device), technique, None), precision)
    parameters = dict(objective.named_parameters())
    plan = Plan(technique=technique, n_epochs=1, batch_size=1, learning_rate=RATE, learning_rate_multiplier=1, seed=0)
    optimizer: Any = (
        bitsandbytes.optim.AdamW8bit(groups(parameters, plan), lr=RATE)
        if arm == "nearest"
        else FULL.make_optimizer(parameters, plan, precision)
    )
    made = rows(a.batch, a.length)
    batch = collate(singles(made), [[i] for i in range(a.batch)], device)
    watched = objective.causal.model.layers[0].mlp.up_proj.weight
    before = watched.detach().clone()
    torch.cuda.reset_peak_memory_stats()
    steps, optimizing = [], []
    for _ in range(a.steps):
        began = _now()
        forward_backward(objective, batch, 1 / (a.batch * a.length))
        middle = _now()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        steps.append(_now() - began)
        optimizing.append(steps[-1] - (middle - began))
    return {
        "arm": arm,
        "weights": sum(p.numel() for p in parameters.values()),
        "step_ms": round(1000 * statistics.median(steps[3:]), 2),
        "optimizer_ms": round(1000 * statistics.median(optimizing[3:]), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "moved": round(float((watched != before).float().mean()), 4),
    }


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def lines(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| rounding | step ms | of it optimizer | peak GiB | weights moved |"
    yield "| --- | --- | --- | --- | --- |"
    for r in results:
        yield (
            f"| {r['arm']} | {r['step_ms']} | {r['optimizer_ms']} | {r['peak_gib']} | {100 * r['moved']:.0f} % |"
            if "error" not in r
            else f"| {r['arm']} | {r['error']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama3-1b", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    a = parser.parse_args()
    results = []
    for arm in a.arms:
        try:
            results.append(measure(arm, a))
        except torch.OutOfMemoryError as error:
            results.append({"arm": arm, "error": str(error).splitlines()[0]})
        gc.collect()
        torch.cuda.empty_cache()
    chosen = {name: getattr(a, name) for name in ("shape", "batch", "length", "steps")}
    a.out.write_text(json.dumps({**hardware(), **chosen, "runs": results}, indent=1) + "\n")
    for line in lines(results):
        print(line)


if __name__ == "__main__":
    main()
