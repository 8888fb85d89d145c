"""Measures what each choice in the kernels changes in a pass through a few layers and the head, on one card.

`python -m bench.layer_ab OUT.json [--works llama3-8b:qlora ...] [--layers 4] [--rows 4] [--length 1904]`. The layers
are random and built by a job's own code; every arm runs the same batch, forward and backward. The time is that of
replays of a CUDA graph, so it is the device's alone; `step` extrapolates it to all layers of the shape. Every arm's
loss and gradients are compared with those of the first arm. Needs a GPU; on a CPU it only shows that every arm runs and
computes the same.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import make_model
from bench.train_rows import of_lengths
from bench.train_side_by_side import hardware
from tunery.planning import activations
from tunery.planning.precision import decide
from tunery.spec import Lora, Qlora
from worker.trainer.cuda_graphs import SCALE, forward_backward
from worker.trainer.data import Batch, collate, singles
from worker.trainer.kernels import cross_entropy
from worker.trainer.loading import RECIPES
from worker.trainer.objective import Objective

WORKS = ["llama3-8b:qlora", "llama3-8b:lora", "llama3-1b:lora"]
TECHNIQUES = {"lora": Lora(), "qlora": Qlora()}
Choice = tuple[Any, str, Any]
ARMS: dict[str, list[Choice]] = {
    "as it is": [],
    "large chunks": [(activations, "CHUNK_BYTES", 2**30)],
    "as it is, again": [],
}
"""The constants that each arm changes: a new choice gets one here. The last arm shows the measurement's own noise."""


@contextmanager
def chosen(arm: str) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in ARMS[arm]]
    for module, name, value in ARMS[arm]:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def build(folder: Path, technique: str, device: torch.device) -> Objective:
    """Returns the model as a job has it at its start, except that its adapters change something."""
    recipe, spec = RECIPES[technique], TECHNIQUES[technique]
    precision = decide(spec, device.type)
    base = recipe.load_base(folder, precision, device)
    objective = Objective(recipe.prepare(base, spec, None), precision).train()
    torch.manual_seed(0)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return objective


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Returns the median time of replays of a CUDA graph of `run`, which has been run before."""
    if device.type != "cuda":
        return 0.0
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def head_pass(objective: Objective, batch: Batch) -> Callable[[], None]:
    weight = objective.causal.get_output_embeddings().weight
    hidden = torch.randn(len(batch.targets), weight.shape[1], device=weight.device, dtype=weight.dtype)
    hidden.requires_grad_()

    def run() -> None:
        hidden.grad = None
        cross_entropy.scaled(hidden, weight, batch.targets, SCALE)[0].backward()

    return run


def one_pass(objective: Objective, batch: Batch) -> tuple[float, Tensor]:
    """Returns the loss and all gradients of one pass."""
    objective.zero_grad(set_to_none=True)
    loss = float(forward_backward(objective, batch, SCALE)[0])
    return loss, torch.cat([p.grad.flatten().float() for p in objective.parameters() if p.grad is not None])


def measure(objective: Objective, batch: Batch, layers: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Returns the figures of one arm. `layers`: how many there are, and how many the whole shape has."""
    device = batch.input_ids.device
    run_head = head_pass(objective, batch)
    run_head()
    head = milliseconds(run_head, device, repeats)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss, gradient = one_pass(objective, batch)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    whole = milliseconds(lambda: forward_backward(objective, batch, SCALE), device, repeats)
    layer = (whole - head) / layers[0]
    return {
        "pass_ms": round(whole, 3), "head_ms": round(head, 3), "layer_ms": round(layer, 4),
        "step_ms": round(head + layer * layers[1], 2), "peak_gib": round(peak, 2), "loss": loss, "gradient": gradient,
    }  # fmt: skip


def kernels(objective: Objective, batch: Batch, most: int = 30) -> list[tuple[str, int, float]]:
    """Returns each kernel's name, launches and milliseconds in one pass, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        forward_backward(objective, batch, SCALE)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [(e.key[:90], e.count, round(e.self_device_time_total / 1000, 3)) for e in events[:most]]


def compare(work: str, folder: Path, a: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    shape, _, technique = work.partition(":")
    all_layers = make_model.SHAPES[shape][2]
    if not folder.exists():
        make_model.make(folder, shape, a.layers)
    objective = build(folder, technique, device)
    made = singles(of_lengths([a.length] * a.rows))
    batch = collate(made, [[i] for i in range(a.rows)], device, borders=objective.knows_borders)
    results: dict[str, Any] = {}
    wanted: Tensor | None = None
    for arm in ARMS:
        with chosen(arm):
            found = measure(objective, batch, (min(a.layers, all_layers), all_layers), a.repeats)
            if device.type == "cuda" and arm == "as it is":
                found["kernels"] = kernels(objective, batch)
        gradient = found.pop("gradient")
        wanted = gradient if wanted is None else wanted
        found["gradient_error"] = float((gradient - wanted).norm() / wanted.norm())
        results[arm] = found
        shown = {key: value for key, value in found.items() if key != "kernels"}
        print(f"{work:18} {arm:24} {json.dumps(shown)}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--works", nargs="+", default=WORKS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1904)
    parser.add_argument("--repeats", type=int, default=15)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    with tempfile.TemporaryDirectory() as models:
        for work in a.works:
            results[work] = compare(work, Path(models) / work.partition(":")[0], a, device)
            chosen_options = {"layers": a.layers, "rows": a.rows, "length": a.length, "repeats": a.repeats}
            a.out.write_text(json.dumps({**hardware(), **chosen_options, "works": results}, indent=1) + "\n")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for work, found in results.items():
        for name, count, ms in found["as it is"].get("kernels", [])[:14]:
            print(f"{work} {count:4} {ms:9.3f} ms {name}")


if __name__ == "__main__":
    main()
