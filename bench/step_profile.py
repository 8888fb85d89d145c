"""Shows which kernels the steps of a job spend their time in, and how long the GPU waits for the host between them.

`python -m bench.step_profile OUT.json [--shape llama3-8b] [--technique qlora] [--lengths long] [--batch 4]
[--packing] [--optimizer adamw] [--models FOLDER]`: the run is prepared in this process as a job's is, on a random
checkpoint, and its passes are recorded if a job's would be. Steps are timed first without the profiler, which slows the
host. Needs a GPU.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import make_model
from bench.job_speed import TECHNIQUES, Work, lay_out
from bench.train_side_by_side import hardware
from worker.trainer.loop import _take_step
from worker.trainer.process import ENVIRONMENT
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare, record_ahead
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

WARM_UP, TIMED, PROFILED = 8, 8, 3
SHOWN = 40
"""Kernels that are printed; OUT.json has all."""


def steps(t: Training, progress: Progress, count: int) -> float:
    """Takes so many steps; returns the milliseconds of each."""
    began = time.monotonic()
    for _ in range(count):
        _take_step(t, progress)
    torch.cuda.synchronize()
    return (time.monotonic() - began) * 1000 / count


def kernels(events: Iterable[Any], count: int) -> list[dict[str, Any]]:
    """Returns the kernels, the slowest first: calls and milliseconds of each of `count` steps.

    Copies on the device count as kernels, the spans that torch names itself, as that of an optimizer's step, do not.
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[event.name][0] += 1 / count
            found[event.name][1] += event.device_time / 1000 / count
    slowest = sorted(found.items(), key=lambda item: -item[1][1])
    return [{"name": name, "calls": round(calls, 1), "ms": round(ms, 3)} for name, (calls, ms) in slowest]


def measure(base: Path, work: Work) -> dict[str, Any]:
    """Returns the milliseconds of a step and of its kernels."""
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "run"
        lay_out(folder, base, work)
        t, progress = prepare(folder, MessageWriter(None), StopSignal()), Progress()
        record_ahead(t, progress)
        steps(t, progress, WARM_UP)
        step_ms = steps(t, progress, TIMED)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            steps(t, progress, PROFILED)
        each = kernels(found.events(), PROFILED)
        plan = str(t.stepper.memory)
    kernels_ms = sum(kernel["ms"] for kernel in each)
    return {"plan": plan, "step_ms": round(step_ms, 1), "kernels_ms": round(kernels_ms, 1), "kernels": each}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=list(make_model.SHAPES), default="llama3-8b")
    parser.add_argument("--technique", choices=list(TECHNIQUES), default="qlora")
    parser.add_argument("--lengths", choices=["full", "long", "real"], default="long")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--optimizer", choices=["adamw", "adamw_8bit"], default="adamw")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models")
    a = parser.parse_args()
    for name, value in ENVIRONMENT.items():  # before anything is allocated
        os.environ.setdefault(name, value)
    base = make_model.ready(a.models, a.shape)
    count = WARM_UP + TIMED + PROFILED
    work = Work(a.technique, a.lengths, a.batch, count, packing=a.packing, optimizer=a.optimizer)
    found = measure(base, work)
    a.out.write_text(json.dumps({**hardware(), "shape": a.shape, **asdict(work), **found}, indent=1) + "\n")
    print(f"{found['plan']}\n{found['step_ms']} ms a step, {found['kernels_ms']} ms of kernels")
    for kernel in found["kernels"][:SHOWN]:
        print(f"{kernel['ms']:9.2f} ms {kernel['calls']:8.1f} calls  {kernel['name'][:150]}")


if __name__ == "__main__":
    main()
