"""The measured peak of memory of whole runs, each in a process of its own as a job's, beside the estimate.

`python -m bench.memory BASE OUT.json [KIND ...] [--limit 480]`: BASE a converted model, whose tokenizer and chat
template all bases take; they are random models of known shapes, made on the spot. KINDS says which there are. On a GPU
the peak is that of the allocator, on a CPU that of the process. A second invocation goes on from what OUT.json holds;
nothing is begun after LIMIT seconds.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.train_side_by_side import hardware
from tunery.spec import Evaluation, Full, General, Lora, Plan, Qlora, Resources, Run, Schedule, Technique

_ATTENTION = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
_SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 49152}
_SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
_BILLION = _ATTENTION | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
_EXPERTS = {"moe_intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 2, "num_local_experts": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-82m-untied": {"model_type": "llama", **_SMALL},
    "llama-57m-tied": {"model_type": "llama", **_SMALL, "tie_word_embeddings": True},
    "qwen3-moe-104m": {"model_type": "qwen3_moe", **_SMALL, **_EXPERTS, "num_hidden_layers": 4},
    "gemma3-57m": {"model_type": "gemma3_text", **_SMALL, "tie_word_embeddings": True},
    "llama-1b-untied": {"model_type": "llama", **_BILLION},
    "qwen3-1b-tied": {"model_type": "qwen3", **_BILLION, "tie_word_embeddings": True},
    "qwen3-moe-1b": {"model_type": "qwen3_moe", **_BILLION, **_EXPERTS, "num_hidden_layers": 8},
    "gemma3-1b": {"model_type": "gemma3_text", **_BILLION, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Kind:
    """One run: rows of about `words` tokens, `batch` a step. `scores`: a test file is answered before and after."""

    shape: str
    technique: Technique
    words: int = 250
    batch: int = 4
    steps: int = 3
    gpus: int = 1
    sharding: str = "auto"
    scores: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_WIDE = Full(weights_dtype="float32")
CPU_KINDS = {
    "cpu lora": Kind("llama-82m-untied", Lora()),
    "cpu lora tied": Kind("llama-57m-tied", Lora()),
    "cpu qlora": Kind("llama-82m-untied", Qlora(compute_dtype="float32")),
    "cpu full": Kind("llama-82m-untied", Full()),
    "cpu full tied": Kind("llama-57m-tied", Full()),
    "cpu full scored": Kind("llama-57m-tied", Full(), scores=True),
    "cpu lora long": Kind("llama-82m-untied", Lora(), words=1500, batch=2),
    "cpu lora moe": Kind("qwen3-moe-104m", Lora()),
    "cpu full moe": Kind("qwen3-moe-104m", Full()),
    "cpu dora": Kind("llama-82m-untied", Lora(use_dora=True)),
    "cpu lora gemma": Kind("gemma3-57m", Lora()),
    "cpu full 8-bit": Kind("llama-82m-untied", Full(), options={"optimizer": "adamw_8bit"}),
}
GPU_KINDS = {
    "lora": Kind("llama-1b-untied", Lora(), words=1000),
    "lora tied": Kind("qwen3-1b-tied", Lora(), words=1000),
    "lora moe": Kind("qwen3-moe-1b", Lora(), words=1000),
    "lora gemma": Kind("gemma3-1b", Lora(), words=1000),
    "lora scored": Kind("llama-1b-untied", Lora(), words=200, scores=True),
    "lora 8k rows": Kind("llama-1b-untied", Lora(), words=8000, batch=1, options={"max_seq_length": 16_384}),
    "dora": Kind("llama-1b-untied", Lora(use_dora=True), words=1000),
    "qlora": Kind("llama-1b-untied", Qlora(), words=1000),
    "qlora tied": Kind("qwen3-1b-tied", Qlora(), words=1000),
    "qlora one row": Kind("llama-1b-untied", Qlora(), words=1000, batch=1),
    "full": Kind("llama-1b-untied", Full(), words=1000),
    "full tied": Kind("qwen3-1b-tied", Full(), words=1000),
    "full fp32": Kind("llama-1b-untied", _WIDE, words=1000),
    "full fp32 8-bit": Kind("llama-1b-untied", _WIDE, words=1000, options={"optimizer": "adamw_8bit"}),
    "full moe": Kind("qwen3-moe-1b", Full(), words=1000),
    "full scored": Kind("llama-1b-untied", Full(), words=200, scores=True),
    "lora, two GPUs": Kind("llama-1b-untied", Lora(), words=1000, gpus=2, sharding="replicate"),
    "full, two GPUs": Kind("llama-1b-untied", Full(), words=1000, gpus=2, sharding="replicate"),
    "full in pieces": Kind("llama-1b-untied", Full(), words=1000, gpus=2, sharding="full_shard"),
    "qlora in pieces": Kind("llama-1b-untied", Qlora(), words=1000, gpus=2, sharding="full_shard"),
}
KINDS = CPU_KINDS | GPU_KINDS
_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def make_base(folder: Path, source: Path, shape: str) -> Path:
    """A random model of a shape in bf16, with the tokenizer of `source`."""
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


def write_rows(path: Path, count: int, words: int) -> None:
    """Rows of which nearly every token is learned."""
    numbers = random.Random(7)
    with path.open("w") as file:
        for _ in range(count):
            text = " ".join(numbers.choice(("one", "two", "three", "four", "five", "six")) for _ in range(words))
            said = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": said}) + "\n")


def lay_out(folder: Path, base: Path, kind: Kind) -> Run:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    write_rows(folder / "data/train.jsonl", kind.steps * kind.batch, kind.words)
    write_rows(folder / "data/valid.jsonl", kind.batch, kind.words)
    options = dict(kind.options)
    if kind.scores:
        write_rows(folder / "data/test.jsonl", 16, 20)
        options["evaluation"] = Evaluation(test_file="test", max_new_tokens=16, general=General(enabled=False))
    plan = Plan(
        technique=kind.technique, n_epochs=1, batch_size=kind.batch, seed=7, learning_rate_multiplier=1,
        learning_rate=1e-5, schedule=Schedule(type="constant", warmup_ratio=0),
        resources=Resources(gpus=kind.gpus, sharding=kind.sharding), **options,  # type: ignore[arg-type]
    )  # fmt: skip
    run = Run(job="bench", base_model=base.name, plan=plan, public_checkpoints=0, snapshot_seconds=3600)
    (folder / "spec.json").write_text(run.model_dump_json())
    return run


def model_info(base: Path) -> dict[str, Any]:
    """What the planning knows of a base."""
    from tunery.rows.template import ChatTemplate
    from worker.trainer import coverage, inspection

    model = inspection.skeleton(str(base), base)
    known = inspection.model_info(str(base), model, ChatTemplate.load(base)) | coverage.model_info(model.config)
    return {name: value for name, value in known.items() if name not in ("linear_modules", "eos_token_ids")}


def row_lengths(folder: Path, run: Run) -> tuple[list[int], list[int]]:
    """Lengths and labelled tokens of the rows, as the trainer reads them."""
    from tunery.rows.template import ChatTemplate
    from worker.trainer.reading import training_rows

    rows = training_rows(folder, run, ChatTemplate.load(folder / "base"))
    return list(rows.lengths), [sum(label >= 0 for label in row.labels) for row in rows.rows]


def train(folder: Path, limit: float) -> tuple[list[dict[str, Any]], int]:
    """The trainer's messages, and the most memory that its process has had, in bytes."""
    command = [sys.executable, "-m", "worker.trainer", str(folder)]
    with (folder / "log.txt").open("wb") as log, (folder / "said.jsonl").open("wb") as said:
        run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=log)
        end = time.monotonic() + limit
        while (done := os.wait4(run.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                run.kill()
            time.sleep(0.1)
    lines = (folder / "said.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done[2].ru_maxrss * 1024


def measure(name: str, base: Path, work: Path, limit: float) -> dict[str, Any]:
    """What came of one kind."""
    kind, folder = KINDS[name], work / name.replace(" ", "-")
    run = lay_out(folder, base, kind)
    began = time.monotonic()
    said, process_bytes = train(folder, limit)
    log = (folder / "log.txt").read_text().splitlines()
    if not said or said[-1]["type"] != "finished":
        return {"kind": name, "failed": said[-1:], "log": log[-5:]}
    lengths, labels = row_lengths(folder, run)
    return {
        "kind": name,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "facts": model_info(base),
        "run": {key: value for key, value in asdict(kind).items() if key != "technique"},
        "technique": kind.technique.model_dump(exclude_defaults=True) | {"type": kind.technique.type},
        "longest": max(lengths),
        "step_tokens": max(sum(lengths[i : i + kind.batch]) for i in range(0, len(lengths), kind.batch)),
        "labels": max(sum(labels[i : i + kind.batch]) for i in range(0, len(labels), kind.batch)),
        "memory_plan": [line.partition("memory plan: ")[2] for line in log if "memory plan: " in line][-1:],
        "peak_bytes": said[-1]["peak_memory_bytes"] or process_bytes,
        "process_bytes": process_bytes,
        "seconds": round(time.monotonic() - began, 1),
    }


def chosen(names: list[str]) -> list[str]:
    """The kinds asked for, or all that this machine's devices can run."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return names or [name for name, kind in (GPU_KINDS if gpus else CPU_KINDS).items() if kind.gpus <= max(1, gpus)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS])
    parser.add_argument("--limit", type=float, default=480)
    a = parser.parse_args()
    end = time.monotonic() + a.limit
    known = json.loads(a.out.read_text())["runs"] if a.out.exists() else []
    runs = [found for found in known if "failed" not in found]
    with tempfile.TemporaryDirectory() as holder:
        for name in chosen(a.kinds):
            if time.monotonic() > end or any(found["kind"] == name for found in runs):
                continue
            base = make_base(Path(holder) / KINDS[name].shape, a.base, KINDS[name].shape)
            runs.append(measure(name, base, Path(holder), max(30.0, end - time.monotonic())))
            a.out.write_text(json.dumps({**hardware(), "runs": runs}, indent=1) + "\n")
            shown = {key: runs[-1].get(key) for key in ("kind", "failed", "log", "peak_bytes", "seconds")}
            print({key: value for key, value in shown.items() if value is not None}, flush=True)


if __name__ == "__main__":
    main()
