"""Measures LoRA whose frozen base waits in the host's memory: `python -m bench.streamed_base OUT.json
[--shape llama3-8b] [--streamed 32 20 12] [--models FOLDER]`.

A prototype, for a decision: Tunery does not do this. The weights of the first layers are in pinned memory and are
copied to one of two buffers on the GPU while the layer before is computed, in the backward pass in the other direction.
All layers are recomputed and their inputs are on the host, as is the input embedding, so that a run takes little
memory. Steps are those of a job on rows of 1,900 to 1,906 tokens. `resident`: the same without any copies of weights.
`loss` and `norm` are those of the run's first rows before a variant's steps; the adapter has learned in the variants
before. Needs a GPU that holds the whole base.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bench import make_model
from bench.job_speed import Work, lay_out
from bench.step_profile import steps
from bench.train_side_by_side import hardware
from worker.trainer import embeddings
from worker.trainer.cuda_graphs import forward_backward
from worker.trainer.data import collate
from worker.trainer.kernels import recomputation
from worker.trainer.memory import release
from worker.trainer.process import ENVIRONMENT
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

WARM_UP, TIMED = 4, 12
SLOTS = 2


class Streamed:
    """Layers of equal shapes, the frozen weights of which are on the host but for those in SLOTS buffers."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._weights = [[p for p in layer.parameters() if not p.requires_grad and p.ndim == 2] for layer in layers]
        self._device = self._weights[0][0].device
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._host = [_pinned(weights) for weights in self._weights]
        self._slots = [torch.empty(self._host[0].nbytes, dtype=torch.uint8, device=self._device) for _ in range(SLOTS)]
        self._in_slot: list[int | None] = [None] * SLOTS
        self._ready = [torch.cuda.Event() if self._copies else None for _ in range(SLOTS)]
        self._views = [_views(slot, self._weights[0]) for slot in self._slots]
        for weights in self._weights:
            for weight in weights:
                weight.data = weight.data.new_empty(0)
        self._forwards = [(layer, layer.forward) for layer in layers]
        for number, (layer, forward) in enumerate(self._forwards):
            layer.forward = self._wrapped(number, forward)

    def undo(self) -> None:
        """Copies all weights back to the GPU."""
        for (layer, forward), weights, host in zip(self._forwards, self._weights, self._host, strict=True):
            layer.forward = forward
            for weight, part in zip(weights, _views(host.to(self._device), weights), strict=True):
                weight.data = part

    def _wrapped(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            slot = self._fetch(number, beside=None)
            if (ready := self._ready[slot]) is not None:
                torch.cuda.current_stream().wait_event(ready)
            for weight, view in zip(self._weights[number], self._views[slot], strict=True):
                weight.data = view
            following = number + (-1 if recomputation.is_running() else 1)
            if 0 <= following < len(self._host):
                self._fetch(following, beside=slot)
            return forward(*args, **kwargs)

        return run

    def _fetch(self, number: int, beside: int | None) -> int:
        """Begins the copy of a layer's weights, if they are in no slot; returns their slot, which is not `beside`."""
        if number in self._in_slot:
            return self._in_slot.index(number)
        slot = 0 if beside is None else (beside + 1) % SLOTS
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())  # whose work so far may use the slot
        with torch.cuda.stream(self._copies):
            self._slots[slot].copy_(self._host[number], non_blocking=True)
            if (ready := self._ready[slot]) is not None:
                ready.record()
        self._in_slot[slot] = number
        return slot


def _pinned(weights: list[nn.Parameter]) -> Tensor:
    size = sum(weight.nbytes for weight in weights)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=weights[0].is_cuda)
    for part, weight in zip(_views(host, weights), weights, strict=True):
        part.copy_(weight.data)
    return host


def _views(memory: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    parts = memory.split([weight.nbytes for weight in weights])
    return [part.view(weight.dtype).view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def once(t: Training) -> dict[str, float]:
    """Returns the loss and the norm of the gradient over the run's first rows, and leaves no gradient."""
    objective = t.objective.train()
    batch = collate(t.rows.examples, [[0, 1, 2, 3]], t.device, objective.pad_to, borders=objective.knows_borders)
    sums = forward_backward(objective, batch, 1e-4)
    parameters = [p for p in objective.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return {"loss": round(float(sums[0]), 4), "norm": round(float(norm), 4)}


def measured(t: Training, progress: Progress, tokens: float) -> dict[str, Any]:
    """Returns one batch's loss and norm, the speed of steps, and their peak in GiB."""
    release(t.device)
    found: dict[str, Any] = once(t)
    steps(t, progress, WARM_UP)
    torch.cuda.reset_peak_memory_stats()
    step_ms = steps(t, progress, TIMED)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return found | {"step_ms": round(step_ms, 1), "tok_s": round(tokens / step_ms * 1000), "peak_gib": round(peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=list(make_model.SHAPES), default="llama3-8b")
    parser.add_argument("--streamed", type=int, nargs="+", default=[12, 20, 32])
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models")
    a = parser.parse_args()
    for name, value in ENVIRONMENT.items():  # before anything is allocated
        os.environ.setdefault(name, value)
    base = make_model.ready(a.models, a.shape)
    counts = [0, *sorted(a.streamed)]
    work = Work("lora", "long", 4, (len(counts) + 1) * (WARM_UP + TIMED))
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "run"
        lay_out(folder, base, work)
        t, progress = prepare(folder, MessageWriter(None), StopSignal()), Progress()
        tokens = t.rows.tokens_a_step(work.batch)
        found: dict[str, Any] = {"as planned": measured(t, progress, tokens)}
        print(t.stepper.memory, found["as planned"], flush=True)
        embeddings.move_to_host(t.objective)
        layers = [m for m in t.objective.causal.modules() if isinstance(m, GradientCheckpointingLayer)]
        for count in counts:
            t.objective.recompute(0)
            streamed = Streamed(layers[:count]) if count else None
            t.objective.recompute(offload=True)
            name = f"{count} streamed" if count else "resident"
            found[name] = measured(t, progress, tokens)
            print(name, found[name], flush=True)
            a.out.write_text(json.dumps({**hardware(), "shape": a.shape, "found": found}, indent=1) + "\n")
            t.objective.recompute(0)
            if streamed is not None:
                streamed.undo()


if __name__ == "__main__":
    main()
