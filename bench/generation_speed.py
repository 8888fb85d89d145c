"""Compares the speed of a job's evaluation with transformers' own `generate`: answers of 64 tokens to 500 prompts.

`python -m bench.generation_speed --model MODEL [--rows 500] [--tokens 64]`: prints one JSON line. The job's path has an
adapter that changes nothing, and sorts the prompts by length into batches of a job's size; transformers has the bare
base and takes the prompts in their order, 32 at once. Prompts have the lengths of instruction data.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.train_rows import lengths, of_lengths
from tunery.planning.precision import decide
from tunery.rows.template import ChatTemplate
from tunery.spec import Lora
from worker.trainer import generation
from worker.trainer.loading import RECIPES
from worker.trainer.scoring.answers import ANSWER_BATCH

PLAIN_BATCH = 32


def answer(causal: Any, template: ChatTemplate, prompts: list[list[int]], size: int, limit: int) -> list[list[int]]:
    """Returns the answers' ids in the order of the prompts, generated `size` at a time."""
    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), size):
            found += generation.greedy(causal, template, prompts[start : start + size], limit)
    return found


def timed(causal: Any, template: ChatTemplate, prompts: list[list[int]], size: int, limit: int) -> dict[str, Any]:
    """Returns the answers and their speed, measured after a batch that warms up."""
    answer(causal, template, prompts[:size], size, 4)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    ids = answer(causal, template, prompts, size, limit)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    length = sum(min(template.answer_length(one) + 1, limit) for one in ids)
    return {
        "ids": ids, "seconds": round(seconds, 2), "tok_s": round(length / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--wait", action="store_true")
    a = parser.parse_args()
    if a.wait:
        sys.stdin.readline()
    device, recipe, technique = torch.device("cuda"), RECIPES["lora"], Lora()
    template = ChatTemplate.load(a.model)
    base: Any = recipe.load_base(a.model, decide(technique, "cuda"), device)
    prompts = [row.input_ids for row in of_lengths(lengths("real", a.rows))]
    plain = timed(base.eval(), template, prompts, PLAIN_BATCH, a.tokens)
    adapted: Any = recipe.prepare(base, technique, None).eval()
    by_length = sorted(prompts, key=len)
    ours = timed(adapted.get_base_model(), template, by_length, ANSWER_BATCH["cuda"], a.tokens)
    wanted = dict(zip(map(tuple, prompts), plain.pop("ids"), strict=True))
    pairs = [(wanted[tuple(prompt)], ids) for prompt, ids in zip(by_length, ours.pop("ids"), strict=True)]
    print("RESULT " + json.dumps({
        "stack": "generation", "rows": a.rows, "tokens": a.tokens, **ours, "transformers": plain,
        "same_answers": sum(one == other for one, other in pairs) / len(pairs),
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
