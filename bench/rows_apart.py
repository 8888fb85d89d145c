"""Times attention of rows in one sequence, each of which sees only itself, by Tunery's kernels and by torch's.

`python -m bench.rows_apart OUT.json`: about 8,000 tokens of a step, in rows of instruction data and in longer ones,
with the heads of some models; microseconds of a layer, forward and backward. Needs a GPU.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.train_rows import lengths
from bench.train_side_by_side import hardware
from worker.trainer.kernels import attention

CALLS = 40
HEADS = {
    "Llama 3 8B": (32, 8, 128),
    "Llama 3.2 1B": (32, 8, 64),
    "Qwen3 0.6B": (16, 8, 128),
    "Llama 2 7B": (32, 32, 128),
}
"""Heads of queries, of keys, and their width."""
ROWS = {
    "real": lengths("real", 32),
    "8 of 1,000": [1000] * 8,
    "4 of 2,000": [2000] * 4,
    "2 of 4,000": [4000] * 2,
    "1 of 8,000": [8000],
}


def microseconds(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        work()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / CALLS * 1000, 1)


def measure(rows: list[int], heads: int, key_heads: int, width: int) -> dict[str, Any]:
    """Returns the times of both kernels, and the norms of their errors against fp32 relative to the result's."""
    ends = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device="cuda")
    borders, scale = attention.Borders(ends, max(rows)), width**-0.5
    made = (
        torch.randn(sum(rows), count, width, device="cuda", dtype=torch.bfloat16)
        for count in (heads, key_heads, key_heads)
    )
    inputs = [part.requires_grad_() for part in made]
    exact = [part.detach().float().requires_grad_() for part in inputs]
    wanted = attention.plain(*exact, borders, scale, None)
    grad = torch.randn_like(wanted)
    references = [wanted, *torch.autograd.grad(wanted, exact, grad)]
    found = {}
    for name, longest in (("own", max(rows)), ("torch", 0)):
        with patch.object(attention, "OWN_LONGEST", longest):
            out = attention.rows_apart(*inputs, borders, scale, None)

            def forward() -> Tensor:
                return attention.rows_apart(*inputs, borders, scale, None)

            def backward(out: Tensor = out) -> tuple[Tensor, ...]:
                return torch.autograd.grad(out, inputs, grad.bfloat16(), retain_graph=True)

            pairs = zip([out, *backward()], references, strict=True)
            errors = [round(float((one.float() - other).norm() / other.norm()), 4) for one, other in pairs]
            found[name] = {"forward_us": microseconds(forward), "backward_us": microseconds(backward), "errors": errors}
    return found


def cases() -> Iterator[dict[str, Any]]:
    for (model, heads), (name, rows) in itertools.product(HEADS.items(), ROWS.items()):
        found = measure(rows, *heads)
        own, torchs = (each["forward_us"] + each["backward_us"] for each in found.values())
        print(f"{model:12} {name:10} own {own:7.1f} torch {torchs:7.1f} us: {torchs / own:.2f}x", found, flush=True)
        yield {"model": model, "rows": name, "lengths": rows, **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    a.out.write_text(json.dumps({**hardware(), "cases": list(cases())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
