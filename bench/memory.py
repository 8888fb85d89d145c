"""Compares the estimated peak of memory with that of whole runs, each in a process of its own, like a job's.

`python -m bench.memory BASE OUT.json [KIND ...] [--limit 480]`: BASE a folder with the config, tokenizer and chat
template that all bases use; the bases are random models of known shapes, made here. `memory_kinds.py` lists the kinds.
On a GPU the peak is that of the allocator, on a CPU that of the process. OUT.json is written after every run, and a
second invocation continues from its results; no run starts after LIMIT seconds.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.memory_kinds import CPU_KINDS, GPU_KINDS, KINDS, SHAPES, Kind
from bench.memory_phases import read_phases
from bench.process_memory import host_bytes
from bench.train_side_by_side import hardware
from tunery import plugins
from tunery.spec import Evaluation, General, Plan, Resources, Run, Schedule

_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def make_base(folder: Path, source: Path, shape: str) -> Path:
    """Writes a random model of a shape in bf16, with the tokenizer of `source`; returns its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder.exists():
        return folder
    tokens = json.loads((source / "config.json").read_text())
    special = {name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = dict(SHAPES[shape])
    config = AutoConfig.for_model(sizes.pop("model_type"), **{**sizes, **special, "max_position_embeddings": 32_768})
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="100GB")
    for path in source.iterdir():
        if path.is_file() and path.name not in (*_MODEL_FILES, "facts.json", "manifest.json", "generation_config.json"):
            shutil.copy(path, folder)
    return folder


def write_rows(path: Path, count: int, words: int, *, pairs: bool = False) -> None:
    """Writes rows of which nearly every token is learned; with `pairs`, each has two answers."""
    numbers = random.Random(7)

    def say() -> dict[str, str]:
        text = " ".join(numbers.choice(("one", "two", "three", "four", "five", "six")) for _ in range(words))
        return {"role": "assistant", "content": text}

    with path.open("w") as file:
        for _ in range(count):
            asked = [{"role": "user", "content": "Count."}]
            row = {"prompt": asked, "chosen": [say()], "rejected": [say()]} if pairs else {"messages": [*asked, say()]}
            file.write(json.dumps(row) + "\n")


def lay_out(folder: Path, base: Path, kind: Kind) -> Run:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    pairs = kind.method.rows_an_example > 1
    write_rows(folder / "data/train.jsonl", kind.steps * kind.batch, kind.words, pairs=pairs)
    write_rows(folder / "data/valid.jsonl", kind.batch, kind.words, pairs=pairs)
    options = dict(kind.options)
    if kind.scores:
        write_rows(folder / "data/test.jsonl", 16, 20)
        options["evaluation"] = Evaluation(test_file="test", max_new_tokens=16, general=General(enabled=False))
    plan = Plan(
        technique=kind.technique, method=kind.method, n_epochs=1, batch_size=kind.batch, seed=7,
        learning_rate_multiplier=1, learning_rate=1e-5, schedule=Schedule(type="constant", warmup_ratio=0),
        resources=Resources(gpus=kind.gpus, sharding=kind.sharding), **options,  # type: ignore[arg-type]
    )  # fmt: skip
    run = Run(job="bench", base_model=base.name, plan=plan, public_checkpoints=0, snapshot_seconds=3600)
    (folder / "spec.json").write_text(run.model_dump_json())
    return run


def model_info(base: Path) -> dict[str, Any]:
    """Returns what planning knows of a base."""
    from tunery.rows.template import ChatTemplate
    from worker.trainer import coverage, inspection

    model = inspection.skeleton(str(base), base)
    known = inspection.model_info(str(base), model, ChatTemplate.load(base)) | coverage.model_info(model.config)
    return {name: value for name, value in known.items() if name not in ("linear_modules", "eos_token_ids")}


def sizes(folder: Path, run: Run) -> dict[str, int]:
    """Returns sizes in tokens of a run's rows, as the trainer reads them.

    They are those of the longest example, the largest step, that step's learned tokens, the longest prompt, and the
    learned tokens of the shortest sequence."""
    from tunery.rows.template import ChatTemplate
    from worker.trainer.reading import training_rows

    found = training_rows(folder, run, ChatTemplate.load(folder / "base"))
    examples, batch = list(found.examples), run.plan.batch_size
    lengths = [len(example) for example in examples]
    learned = [[sum(label >= 0 for label in row.labels) for row in example.rows] for example in examples]
    labels = [sum(rows) for rows in learned]
    prompts = [next(place for place, label in enumerate(row.labels) if label >= 0) for row in found.rows]
    return {
        "longest": max(lengths),
        "step_tokens": max(sum(lengths[i : i + batch]) for i in range(0, len(lengths), batch)),
        "labels": max(sum(labels[i : i + batch]) for i in range(0, len(labels), batch)),
        "prompt": max(prompts),
        "shortest": min(count for rows in learned for count in rows),
    }


def train(folder: Path, limit: float) -> tuple[list[dict[str, Any]], int]:
    """Runs the trainer; returns its messages and the peak memory of its process in bytes."""
    command = [sys.executable, "-m", "worker.trainer", str(folder)]
    with (folder / "log.txt").open("wb") as log, (folder / "said.jsonl").open("wb") as said:
        plugged = os.environ | {plugins.VARIABLE: "bench.memory_phases"}
        run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=log, env=plugged)
        end, peak = time.monotonic() + limit, 0
        while run.poll() is None:
            peak = max(peak, host_bytes(pid=run.pid))
            if time.monotonic() > end:
                run.kill()
            time.sleep(0.1)
    lines = (folder / "said.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], peak


def measure(name: str, base: Path, work: Path, limit: float) -> dict[str, Any]:
    """Returns the result of one kind's run."""
    kind, folder = KINDS[name], work / name.replace(" ", "-")
    run = lay_out(folder, base, kind)
    began = time.monotonic()
    said, process_bytes = train(folder, limit)
    log = (folder / "log.txt").read_text().splitlines()
    if not said or said[-1]["type"] != "finished":
        return {"kind": name, "failed": said[-1:], "log": log[-5:]}
    return {
        "kind": name,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "facts": model_info(base),
        "run": {key: value for key, value in asdict(kind).items() if key not in ("technique", "method")},
        "technique": kind.technique.model_dump(exclude_defaults=True) | {"type": kind.technique.type},
        "method": kind.method.type,
        **sizes(folder, run),
        "memory_plan": [line.partition("memory plan: ")[2] for line in log if "memory plan: " in line][-1:],
        "peak_bytes": said[-1]["peak_memory_bytes"] or process_bytes,
        "process_bytes": process_bytes,
        "phases": read_phases(log),
        "seconds": round(time.monotonic() - began, 1),
    }


def chosen(names: list[str]) -> list[str]:
    """Returns the requested kinds, or all that this machine's devices can run."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return names or [name for name, kind in (GPU_KINDS if gpus else CPU_KINDS).items() if kind.gpus <= max(1, gpus)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS])
    parser.add_argument("--limit", type=float, default=480)
    a = parser.parse_args()
    measure_all(a.base, a.out, chosen(a.kinds), time.monotonic() + a.limit)


def measure_all(source: Path, out: Path, names: list[str], end: float) -> None:
    """Measures each kind that `out` does not have yet and writes it there; starts none after `end`."""
    known = json.loads(out.read_text())["runs"] if out.exists() else []
    runs = [found for found in known if "failed" not in found]
    with tempfile.TemporaryDirectory() as holder:
        for name in names:
            if time.monotonic() > end or any(found["kind"] == name for found in runs):
                continue
            base = make_base(Path(holder) / KINDS[name].shape, source, KINDS[name].shape)
            runs.append(measure(name, base, Path(holder), max(30.0, end - time.monotonic())))
            write(out, {**hardware(), "runs": runs})
            shutil.rmtree(Path(holder) / name.replace(" ", "-"))  # a full fine-tune leaves tens of GB
            shown = {key: runs[-1].get(key) for key in ("kind", "failed", "log", "peak_bytes", "phases", "seconds")}
            print({key: value for key, value in shown.items() if value is not None}, flush=True)


def write(out: Path, found: dict[str, Any]) -> None:
    """Replaces `out` in one step: a process that is killed while writing leaves the file of the run before."""
    half = out.with_name(out.name + ".part")
    half.write_text(json.dumps(found, indent=1) + "\n")
    half.replace(out)


if __name__ == "__main__":
    main()
