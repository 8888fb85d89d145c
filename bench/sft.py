"""Compares supervised tuning with TRL's SFTTrainer on a CPU in fp32: same weights, rows, order, masks and settings.

`python -m bench.sft BASE OUT.json --trl PYTHON [--steps 16] [--only RUN ...]`; BASE: a model's folder, or `tiny`, a
random one of two layers; PYTHON: one that has TRL. Prints and records both trainers' loss and gradient norm of every
step. The runs have several epochs, warmup and decay of the learning rate, weight decay, clipping, and two micro-batches
a step. TRL packs by `padding_free`: the rows of a micro-batch are one sequence.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import beside_trl
from tunery.spec import Full, Lora, Plan, Qlora, Run, Schedule
from worker.trainer.data import rows_of_step
from worker.trainer.loop import _take_step, learning_rate
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

RUNS: dict[str, tuple[Lora | Full, bool, float]] = {
    "lora padded": (Lora(r=8), False, 1e-3),
    "lora packed": (Lora(r=8), True, 1e-3),
    "full padded": (Full(), False, 1e-4),
    "full packed": (Full(), True, 1e-4),
}
BATCH, MICRO_BATCH, EPOCHS = 8, 4, 2


def start(
    folder: Path, base: Path, technique: Lora | Qlora | Full, rate: float, *, packing: bool = False, steps: int = 16
) -> Training:
    """Prepares a run on Banking's questions and labels, which differ in length, with the weights it starts from."""
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    lines = (beside_trl.ROOT / "examples" / "banking_train.jsonl").read_text().splitlines()
    # Without the long system prompt, which is the same in every row.
    rows = [json.loads(line)["messages"][-2:] for line in lines[: BATCH * steps // EPOCHS]]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    plan = Plan(
        technique=technique, n_epochs=EPOCHS, batch_size=BATCH, learning_rate=rate, learning_rate_multiplier=1, seed=0,
        packing=packing, weight_decay=0.1, schedule=Schedule(type="cosine", warmup_ratio=0.1, min_ratio=0.1),
    )  # fmt: skip
    (folder / "spec.json").write_text(Run(job="bench", base_model="base", plan=plan).model_dump_json())
    t = prepare(folder, MessageWriter(None), StopSignal())
    longest = max(t.rows.lengths)
    packed = None if t.stepper.memory.packed_tokens is None else MICRO_BATCH * longest
    t.stepper.adopt(replace(t.stepper.memory, max_tokens=MICRO_BATCH * longest, packed_tokens=packed))
    return t


def ours(t: Training) -> list[dict[str, float]]:
    t.objective.train()
    progress, found = Progress(), []
    while progress.step < t.total_steps:
        message, *_ = _take_step(t, progress)
        found.append({"loss": message.train_loss, "grad_norm": message.grad_norm})
    return found


def _given(t: Training, folder: Path, *, packing: bool) -> dict[str, Any]:
    """Returns what TRL needs to train the same."""
    steps = range(1, t.total_steps + 1)
    drawn = [i for step in steps for i in rows_of_step(len(t.rows.examples), step, BATCH, t.plan.seed)]
    return {
        "base": str(t.folder / "base"),
        "adapter": str(folder / "adapter") if t.plan.technique.type == "lora" else None,
        "rows": [{"input_ids": row.input_ids, "labels": row.labels} for row in (t.rows.rows[i] for i in drawn)],
        "micro_batch": MICRO_BATCH,
        "micro_batches": BATCH // MICRO_BATCH,
        "padding_free": packing,
        "rates": [learning_rate(t.plan, step, t.total_steps) for step in steps],
        "weight_decay": t.plan.weight_decay,
        "max_grad_norm": t.plan.max_grad_norm,
    }


def compare(base: Path, name: str, python: str, steps: int) -> dict[str, Any]:
    """Runs both trainers; returns their steps and the largest differences."""
    technique, packing, rate = RUNS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        t = start(folder / "run", base, technique, rate, packing=packing, steps=steps)
        if technique.type == "lora":
            t.objective.model.save_pretrained(str(folder / "adapter"))  # type: ignore[operator]
        theirs = beside_trl.run("sft_trl.py", _given(t, folder, packing=packing), folder, python)
        mine = ours(t)
    both = list(zip(mine, theirs["steps"], strict=True))
    return {
        "run": name,
        "versions_trl": theirs["versions"],
        "largest_difference": {
            key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in both) for key in ("loss", "grad_norm")
        },
        "ours": mine,
        "trl": theirs["steps"],
    }


if __name__ == "__main__":
    beside_trl.main(RUNS, 16, compare)
