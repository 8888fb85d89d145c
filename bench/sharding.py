"""Compares a model sharded over two GPUs with a whole one on one GPU: `python -m bench.sharding OUT.json [options]`.

Prints what each rank of a full fine-tune keeps, for the shapes of 8B, 13B and 70B on 2, 4 and 8 cards, computed on
meta tensors. With two GPUs it then trains a random Llama of 1.5 billion weights for a few steps, whole on one card and
sharded over two, by full fine-tuning and by QLoRA, with the same rows a step; and one of 8 billion, sharded over two.
Losses are compared with each other, and each rank's memory with the table. Every run has a time limit, and each result
is printed and written as soon as the run ends.

Options: `--table` prints only the table; `--models` keeps the checkpoints in a folder. To try it without GPUs:
`--base` a tiny model, `--steps 3`.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.process_memory import host_bytes
from bench.two_gpus import lay_out
from tunery.spec import Full, Plan, Qlora, Resources, Run

ROOT = Path(__file__).parents[1]
STEPS, SEED = 6, 7
NOISE = 0.01
"""Relative difference of a step's loss that another order of summation may cause in bf16 over a few steps."""
TABLE = [("llama3-8b", 1), ("llama3-8b", 2), ("llama2-13b", 4), ("llama2-13b", 8), ("llama2-70b", 8), ("llama3-70b", 8)]
GB = 1e9
RUNS = {  # technique, rate, shape, GPUs
    "full 1B, one card": (Full(), 2e-5, "llama3-1b", 1),
    "full 1B, two cards": (Full(), 2e-5, "llama3-1b", 2),
    "qlora 1B, one card": (Qlora(), 2e-4, "llama3-1b", 1),
    "qlora 1B, two cards": (Qlora(), 2e-4, "llama3-1b", 2),
    "full 8B, two cards": (Full(), 2e-5, "llama3-8b", 2),
}
LIMIT = 150
"""Seconds that a run may take."""
SIZES = ("weights", "moments", "allocated", "peak", "host_bytes")
"""The figures of a rank. `host_bytes`: by how much the peak of its process's memory grows until it can train."""


def config(shape: str) -> Any:
    """Returns the architecture of one of `make_model`'s shapes."""
    from transformers import LlamaConfig

    from bench.make_model import SHAPES

    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip


def table(rows: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Returns what each rank keeps in bf16 with 8-bit moments, and what it gathers on top while a layer computes."""
    from tunery.planning.precision import decide
    from worker.trainer import layout

    precision = decide(Full(), "cuda")
    found = []
    for shape, ranks in rows:
        each = layout.compute(config(shape), precision, ranks)
        found.append({"shape": shape, "ranks": ranks, **asdict(each)})
    return found


def show(rows: list[dict[str, Any]]) -> None:
    print("GB a rank         cards  weights  gradients  moments  together  gathered")
    for row in rows:
        parts = [row[name] / GB for name in ("weights", "gradients", "moments")]
        print(
            f"{row['shape']:16} {row['ranks']:6} {parts[0]:8.2f} {parts[1]:10.2f} {parts[2]:8.2f} {sum(parts):9.2f} "
            f"{row['gathered'] / GB:9.2f}",
            flush=True,
        )


def rank(folder: Path, record: Path) -> None:
    """Trains as the rank that the environment names, and writes its losses and its memory to `record`."""
    import torch
    from pydantic import BaseModel

    from worker.trainer import loop, process, run
    from worker.trainer.report import MessageWriter
    from worker.trainer.stop_signal import StopSignal
    from worker.trainer.training import Progress

    process._configure(int(os.environ["RANK"]))
    cuda, began = torch.cuda.is_available(), time.monotonic()
    found: dict[str, Any] = {"losses": [], "norms": [], "seconds": []}

    class Noting(MessageWriter):
        def write(self, message: BaseModel) -> None:
            super().write(message)
            if getattr(message, "type", "") == "step":
                said: Any = message
                found["losses"].append(said.train_loss)
                found["norms"].append(said.grad_norm)
                found["seconds"].append(round(said.seconds, 3))

    before = host_bytes()
    t = run.prepare(folder, Noting(None), StopSignal())
    found["host_bytes"] = host_bytes() - before
    found["prepared_seconds"] = round(time.monotonic() - began, 1)
    found["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    found["world"], found["memory_plan"] = t.ranks.count, asdict(t.stepper.memory)
    found["weights"] = [
        sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in t.objective.parameters()),
        sum(p.nbytes for p in t.objective.parameters()),
    ]
    found["moments"] = sum(v.nbytes for s in t.optimizer.state.values() for v in s.values() if hasattr(v, "nbytes"))
    if cuda:
        torch.cuda.empty_cache()
        found["allocated"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    loop.train(t, Progress())
    if cuda:
        found["peak"] = torch.cuda.max_memory_allocated()
    record.write_text(json.dumps(found))


def carry_out(name: str, base: Path, work: Path, steps: int, card: int) -> list[dict[str, Any]]:
    """Carries out a run; returns each rank's record. Raises RuntimeError with the logs' ends if a rank fails."""
    from tunery import processes

    technique, rate, _, gpus = RUNS[name]
    folder = lay_out(work / name.replace(" ", "-").replace(",", ""), base, technique, rate, gpus, steps, 1e6)
    _edit_spec(folder, gpus)
    shared = {
        **os.environ,
        "WORLD_SIZE": str(gpus),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(processes.free_port()),
    }
    if gpus == 1:
        shared["CUDA_VISIBLE_DEVICES"] = str(card)
    records, ranks = [folder / f"rank-{index}.json" for index in range(gpus)], []
    for index, record in enumerate(records):
        command = [sys.executable, "-m", "bench.sharding", "--rank", str(folder), str(record)]
        with (folder / f"log-{index}").open("wb") as log:
            environment = {**shared, "RANK": str(index), "LOCAL_RANK": str(index)}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    _wait(ranks)
    if any(process.returncode for process in ranks):
        tails = [(folder / f"log-{index}").read_text()[-1500:] for index in range(gpus)]
        raise RuntimeError(f"{name}: {[process.returncode for process in ranks]}\n" + "\n".join(tails))
    return [json.loads(record.read_text()) for record in records]


def _edit_spec(folder: Path, gpus: int) -> None:
    """Edits the spec: asks for sharding on several GPUs, and for no files at the end of an epoch."""
    spec = folder / "spec.json"
    run = Run.model_validate_json(spec.read_text())
    resources = Resources(gpus=gpus, sharding="full_shard" if gpus > 1 else "auto")  # type: ignore[arg-type]
    plan: Plan = run.plan.model_copy(update={"resources": resources})
    spec.write_text(run.model_copy(update={"plan": plan, "public_checkpoints": 0}).model_dump_json())


def _wait(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all ranks; ends them at the time limit, or soon after one has failed."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.2)
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def summary(name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the summary of a run: its losses, and each rank's weights, moments and memory."""
    sizes = [{key: each[key] for key in SIZES if key in each} for each in ranks]
    first = ranks[0]
    kept = {key: first[key] for key in ("losses", "norms", "seconds", "prepared_seconds", "memory_plan", "device")}
    return {"run": name, "world": first["world"], **kept, "ranks": sizes}


def compare(results: list[dict[str, Any]]) -> list[str]:
    """Returns the results as sentences: losses compared with those of one card, and each rank's bytes."""
    by_name = {found["run"]: found for found in results}
    lines = []
    for kind in ("full 1B", "qlora 1B"):
        one, two = (by_name.get(f"{kind}, {cards}") for cards in ("one card", "two cards"))
        if one and two:
            worst = max(abs(b / a - 1) for a, b in zip(one["losses"], two["losses"], strict=True))
            lines.append(f"{kind}: largest relative difference of a step's loss {worst:.2e} (noise: {NOISE})")
    for name, found in by_name.items():
        for number, each in enumerate(found["ranks"]):
            here, whole = (size / GB for size in each["weights"])
            text = (
                f"{name}, rank {number}: {here:.3f} of {whole:.3f} GB of weights, {each['moments'] / GB:.3f} of moments"
            )
            text += f", peak {each['peak'] / GB:.2f} GB" if "peak" in each else ""
            lines.append(f"{text}, {each['host_bytes'] / GB:.2f} GB on the host while it is loaded")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--rank", type=Path, nargs=2)
    a = parser.parse_args()
    if a.rank:
        rank(*a.rank)
        return 0
    show(layouts := table(TABLE))
    if a.table or a.out is None:
        return 0
    return measure(a, layouts)


def measure(a: argparse.Namespace, layouts: list[dict[str, Any]]) -> int:
    from bench import make_model
    from bench.train_side_by_side import hardware

    began, failed = time.monotonic(), 0
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        for number, name in enumerate(a.runs):
            shape = RUNS[name][2]
            try:
                base = a.base or make_model.ready(a.models, shape)
                found = carry_out(name, base, Path(home), a.steps, number % 2)
            except (RuntimeError, OSError) as error:
                failed += 1
                print(f"FAILED after {time.monotonic() - began:.0f} s: {error}", flush=True)
                continue
            results.append(summary(name, found))
            print(f"{time.monotonic() - began:.0f} s: {json.dumps(results[-1])}", flush=True)
            record = {**hardware(), "noise": NOISE, "layout": layouts, "runs": results, "found": compare(results)}
            a.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(compare(results)), flush=True)
    equal = all(math.isfinite(loss) for found in results for loss in found["losses"])
    return 0 if equal and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
