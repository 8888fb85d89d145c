"""Compares the speed of a job's evaluation with transformers' own `generate`: answers of 64 tokens to 500 prompts.

`python -m bench.generation_speed --model MODEL [--technique lora] [--rows 500] [--plain-rows 500] [--tokens 64]
[--shared 0]`: prints one JSON line. The job's path has the technique's adapter, if any, which changes nothing, and
sorts the prompts by length into batches as large as memory allows; transformers has the same base without an adapter,
and takes the first `--plain-rows` prompts in their order, 32 at once. The ratio is of tokens a second. Prompts have the
lengths of instruction data, after `--shared` tokens that all begin with.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.train_rows import lengths, of_lengths
from tunery.planning.precision import decide
from tunery.rows.template import ChatTemplate
from tunery.spec import Full, Lora, Qlora, Technique
from worker.trainer import generation, precision
from worker.trainer.decoding.ties import tie
from worker.trainer.generation import Greedy, Prompts
from worker.trainer.loading import RECIPES

PLAIN_BATCH = 32
TECHNIQUES: dict[str, Technique] = {"lora": Lora(), "qlora": Qlora(), "full": Full()}


def by_transformers(causal: Any, template: ChatTemplate, prompts: Prompts, limit: int) -> list[list[int]]:
    """Returns the answers in the order of the prompts, generated 32 at a time."""
    found = []
    for start in range(0, len(prompts), PLAIN_BATCH):
        given = generation.greedy(causal, template, prompts[start : start + PLAIN_BATCH], limit)
        found += [ids[: template.answer_length(ids) + 1] for ids in given]
    return found


def by_tunery(causal: Any, template: ChatTemplate, prompts: Prompts, limit: int) -> list[list[int]]:
    """Returns the answers in the order of the prompts, as an evaluation generates them."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    greedy = Greedy(causal, template, limit)
    found: dict[int, list[int]] = {}
    while len(found) < len(order):
        waiting = order[len(found) :]
        chosen = waiting[: greedy.batch_size([len(prompts[i]) for i in waiting])]
        print(f"a batch of {len(chosen)} rows", file=sys.stderr)
        found |= zip(chosen, greedy.answer([prompts[i] for i in chosen]), strict=True)
    greedy.close()
    if greedy.against is not None:
        print(f"answered by transformers: {greedy.against}", file=sys.stderr)
    return [found[i] for i in range(len(prompts))]


def timed(answer: Callable[[Prompts, int], list[list[int]]], prompts: Prompts, limit: int) -> dict[str, Any]:
    """Returns the answers and their speed, measured after a batch that warms up."""
    answer(prompts[:PLAIN_BATCH], 4)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    ids = answer(prompts, limit)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "ids": ids, "seconds": round(seconds, 2), "tok_s": round(sum(map(len, ids)) / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }  # fmt: skip


def is_tie(causal: Any, prompt: list[int], wanted: list[int], given: list[int]) -> bool:
    """Whether rounding in bf16 decides between the first tokens that differ, by the logits of a pass over the row."""
    place = next((i for i, (one, other) in enumerate(zip(wanted, given, strict=False)) if one != other), None)
    if place is None:
        return False
    ids = torch.tensor([prompt + wanted[:place]], device=causal.device)
    logits = causal(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    one, other = float(logits[wanted[place]]), float(logits[given[place]])
    return abs(one - other) <= tie(max(abs(one), abs(other)), "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--technique", choices=TECHNIQUES, default="lora")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--plain-rows", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--wait", action="store_true")
    a = parser.parse_args()
    if a.wait:
        sys.stdin.readline()
    device, recipe, technique = torch.device("cuda"), RECIPES[a.technique], TECHNIQUES[a.technique]
    template, decided = ChatTemplate.load(a.model), decide(technique, "cuda")
    base: Any = recipe.load_base(a.model, decided, device).eval()
    shared = list(range(1000, 1000 + a.shared))
    prompts = [shared + row.input_ids for row in of_lengths(lengths("real", a.rows))]
    with torch.no_grad(), precision.autocast(decided, device):
        plain = timed(
            lambda some, limit: by_transformers(base, template, some, limit), prompts[: a.plain_rows], a.tokens
        )
        print("transformers:", plain["seconds"], file=sys.stderr)
        adapted: Any = recipe.prepare(base, technique, None).eval()
        causal = adapted.get_base_model() if a.technique != "full" else adapted
        ours = timed(lambda some, limit: by_tunery(causal, template, some, limit), prompts, a.tokens)
        print("a job:", ours["seconds"], file=sys.stderr)
        rows = list(zip(prompts, plain.pop("ids"), ours.pop("ids"), strict=False))
        ties = sum(is_tie(causal, *row) for row in rows if row[1] != row[2])
    print("RESULT " + json.dumps({
        "stack": "generation", "technique": a.technique, "rows": a.rows, "tokens": a.tokens, "shared": a.shared, **ours,
        "transformers": {"rows": len(rows), **plain}, "ratio": round(ours["tok_s"] / plain["tok_s"], 2),
        "same_answers": sum(one == other for _, one, other in rows) / len(rows), "ties": ties / len(rows),
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
