"""Measures what adapters add to the linear layers of a decoding step: `python -m bench.adapter_kernels OUT.json
[--rank 16] [--rows 1 16 32]`.

All linear layers of an 8B shape in bf16, random, one after the other on fixed inputs, with an adapter of its own for
each row or none, as one CUDA graph: the time is the device's alone. Needs a GPU.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bench.layer_ab import milliseconds
from bench.serving_shape import LLAMA_8B, sites_of
from bench.train_side_by_side import hardware
from worker.server import lora_triton
from worker.server.factors import Stack

CUDA = torch.device("cuda")


class Layers:
    """The linear layers and `count` adapters of them."""

    def __init__(self, rank: int, count: int) -> None:
        with torch.device("meta"):
            sites = sites_of(AutoModelForCausalLM.from_config(LLAMA_8B), rank)
        self.stack = Stack(sites, CUDA)
        draws = {"device": CUDA, "dtype": torch.bfloat16}
        self.weights = {site.name: torch.randn(site.outputs, site.inputs, **draws) * 0.01 for site in sites}
        self.adapters = [torch.randn(sum(site.numel for site in sites), device=CUDA) * 0.01 for _ in range(count)]
        self.inputs = {site.inputs: torch.randn(count, 1, site.inputs, **draws) for site in sites}

    def step(self, rows: int, *, adapted: bool) -> Callable[[], None]:
        addresses = torch.tensor([one.data_ptr() for one in self.adapters[:rows]], device=CUDA)

        def run() -> None:
            for start, site in self.stack.starts.values():
                x = self.inputs[site.inputs][:rows]
                out = functional.linear(x, self.weights[site.name])
                if adapted:
                    lora_triton.add(
                        x, addresses, out, start=start, rank=site.rank, inputs=site.inputs, outputs=site.outputs,
                        is_aligned=self.stack.is_aligned, rounds_twice=False,
                    )  # fmt: skip

        return run


@torch.inference_mode()
def measure(layers: Layers, rows: int) -> dict[str, float]:
    """Returns the milliseconds of the layers of a step alone, and what adapters add to them."""
    found = []
    for adapted in (False, True):
        run = layers.step(rows, adapted=adapted)
        run()
        found.append(milliseconds(run, CUDA, repeats=10))
    return {"layers": round(found[0], 3), "adapters": round(found[1] - found[0], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32])
    asked = parser.parse_args()
    layers = Layers(asked.rank, max(asked.rows))
    found: dict[str, Any] = {"overlap": lora_triton.starts_early(CUDA), "rank": asked.rank}
    found["milliseconds"] = {rows: measure(layers, rows) for rows in asked.rows}
    print(json.dumps(found), flush=True)
    asked.out.write_text(json.dumps(hardware() | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
