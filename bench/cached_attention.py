"""Times attention of decoding steps: over each row's own positions, and by torch over all, with a mask.

`python -m bench.cached_attention OUT.json`: steps of an answer's middle, of prompts as long as those of instruction
data. GB/s are of the keys and values that the rows have. Needs a GPU.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.train_rows import lengths
from bench.train_side_by_side import hardware
from worker.trainer.kernels import cached_attention

LAYERS, CALLS = 8, 20
"""Caches that are read in turn, so that none is in the GPU's own cache, and how often all are read."""


@dataclass(frozen=True)
class Case:
    """A batch: `answered` tokens of its answers, prompts of a third of a row of instruction data or `prompt` tokens."""

    name: str
    rows: int
    heads: int
    key_heads: int
    answered: int
    prompt: int | None = None

    def lengths(self) -> list[int]:
        prompts = [self.prompt] * self.rows if self.prompt else sorted(each // 3 for each in lengths("real", self.rows))
        return [prompt + self.answered for prompt in prompts]


CASES = (
    Case("Llama 2 7B, 96 rows", 96, 32, 32, 512),
    Case("Llama 3 8B, 256 rows", 256, 32, 8, 256),
    Case("Llama 3 8B, 32 rows of 1,000 tokens", 32, 32, 8, 64, 936),
    Case("Llama 3 8B, one row of 1,000 tokens", 1, 32, 8, 64, 936),
    Case("Llama 2 7B, one row of 1,000 tokens", 1, 32, 32, 64, 936),
)
WIDTH = 128


def milliseconds(work: Callable[[], object]) -> float:
    """Returns the time of `work` as a CUDA graph, for each of the LAYERS that it calls."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS / LAYERS


def masked(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Returns attention as it is without the kernel: heads that share keys are tokens of one head."""
    grouped = query.unflatten(1, (keys.shape[1], -1))
    return functional.scaled_dot_product_attention(grouped, keys, values, mask)


def measure(case: Case) -> dict[str, Any]:
    """Returns a case's milliseconds by both ways."""
    own = torch.tensor(case.lengths(), device="cuda")
    positions = -(-int(own.max()) // 8) * 8
    drawn = {"dtype": torch.bfloat16, "device": "cuda"}
    query = torch.randn(case.rows, case.heads, WIDTH, **drawn)
    caches = [torch.randn(2, case.rows, case.key_heads, positions, WIDTH, **drawn) for _ in range(LAYERS)]
    mask = (torch.arange(positions, device="cuda") < own[:, None])[:, None, None]
    with torch.no_grad():
        kernel = milliseconds(lambda: [cached_attention.attend(query, *cache, own, WIDTH**-0.5) for cache in caches])
        torch_ms = milliseconds(lambda: [masked(query, *cache, mask) for cache in caches])
    read = 2 * int(own.sum()) * case.key_heads * WIDTH * 2
    return {
        **asdict(case), "positions": positions, "mean_length": round(float(own.float().mean())),
        "kernel_ms": round(kernel, 4), "torch_ms": round(torch_ms, 4),
        "kernel_gb_s": round(read / kernel / 1e6), "torch_gb_s": round(read / torch_ms / 1e6),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found = []
    for case in CASES:
        found.append(measure(case))
        torch.cuda.empty_cache()
        print(json.dumps(found[-1]), flush=True)
    out.write_text(json.dumps({**hardware(), "width": WIDTH, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
