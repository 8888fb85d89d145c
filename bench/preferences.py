"""Compares preference tuning with TRL's DPOTrainer on a CPU in fp32: same weights, rows, order, masks and settings.

`python -m bench.preferences BASE OUT.json --trl PYTHON [--steps 12] [--only RUN ...]`; BASE: a model's folder, or
`tiny`, a random one of two layers; PYTHON: one that has TRL. Prints and records both losses of every step, the largest
relative difference of the losses and, where both define the margin alike, the margin's.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from bench import beside_trl
from tunery.spec import Dpo, Full, Lora, Plan, Run, Schedule
from worker.trainer import reference
from worker.trainer.data import Row, rows_of_step
from worker.trainer.loop import _take_step
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

RUNS: dict[str, tuple[Dpo, Lora | Full, float]] = {
    "lora sigmoid": (Dpo(), Lora(r=8), 1e-3),
    "lora ipo": (Dpo(loss="ipo"), Lora(r=8), 1e-3),
    "lora dpo_norm": (Dpo(loss="dpo_norm"), Lora(r=8), 1e-3),
    "full sigmoid": (Dpo(), Full(), 1e-4),
}
BATCH = 4


def pairs(count: int) -> list[dict[str, Any]]:
    """Returns pairs for Banking's questions: the right label, and that of a later row."""
    lines = (beside_trl.ROOT / "examples" / "banking_train.jsonl").read_text().splitlines()[: 2 * count]
    rows = [json.loads(line)["messages"] for line in lines]
    made = []
    for index in range(count):
        *prompt, answer = rows[index]
        other = next(row[-1] for row in rows[index + 1 :] if row[-1]["content"] != answer["content"])
        made.append({"input": {"messages": prompt}, "preferred_output": [answer], "non_preferred_output": [other]})
    return made


def start(folder: Path, base: Path, name: str, steps: int) -> Training:
    """Prepares a run of one epoch in `folder`, with the weights that it starts from."""
    method, technique, rate = RUNS[name]
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    lines = [json.dumps(pair) + "\n" for pair in pairs(BATCH * steps)]
    (folder / "data" / "train.jsonl").write_text("".join(lines))
    plan = Plan(
        technique=technique, method=method, n_epochs=1, batch_size=BATCH, learning_rate=rate,
        learning_rate_multiplier=1, seed=0, schedule=Schedule(type="constant", warmup_ratio=0),
    )  # fmt: skip
    (folder / "spec.json").write_text(Run(job="bench", base_model="base", plan=plan).model_dump_json())
    return prepare(folder, MessageWriter(None), StopSignal())


def ours(t: Training) -> list[dict[str, float]]:
    reference.attach(t)
    t.objective.train()
    progress, found = Progress(), []
    while progress.step < t.total_steps:
        message, *_ = _take_step(t, progress)
        found.append({"loss": message.train_loss, "margin": message.train_metrics["rewards_margin"]})
    return found


def trl(t: Training, python: str, folder: Path) -> dict[str, Any]:
    """Trains the same with TRL; returns its `steps` and `versions`."""
    method = t.plan.method.decided()
    assert isinstance(method, Dpo)
    drawn = [i for step in range(1, t.total_steps + 1) for i in rows_of_step(len(t.rows.examples), step, BATCH, 0)]
    given = {
        "base": str(t.folder / "base"),
        "adapter": str(folder / "adapter") if t.plan.technique.type == "lora" else None,
        "pairs": [_ids(t.rows.examples[i].rows) for i in drawn],
        "batch": BATCH,
        "rate": t.plan.learning_rate,
        "max_grad_norm": t.plan.max_grad_norm,
        "beta": method.beta,
        "loss": {"dpo_norm": "sigmoid_norm"}.get(method.loss, method.loss),
    }
    return beside_trl.run("preferences_trl.py", given, folder, python)


def _ids(rows: tuple[Row, ...]) -> dict[str, list[int]]:
    """Returns the ids of the prompt and of both answers, without what follows an answer: neither trainer learns it."""
    prompt = next(i for i, label in enumerate(rows[0].labels) if label >= 0)
    answers = [[label for label in row.labels if label >= 0] for row in rows]
    return {"prompt_ids": rows[0].input_ids[:prompt], "chosen_ids": answers[0], "rejected_ids": answers[1]}


def compare(base: Path, name: str, python: str, steps: int) -> dict[str, Any]:
    """Runs both trainers; returns their steps and the largest differences."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        t = start(folder / "run", base, name, steps)
        if t.plan.technique.type == "lora":
            t.objective.model.save_pretrained(str(folder / "adapter"))  # type: ignore[operator]
        theirs = trl(t, python, folder)
        mine = ours(t)
    both = list(zip(mine, theirs["steps"], strict=True))
    differences = {"loss": max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in both)}
    if name.endswith("sigmoid"):  # TRL's rewards are always sums over tokens; ours are the loss's inputs
        differences["margin"] = max(abs(a["margin"] - b["margin"]) for a, b in both)
    return {
        "run": name,
        "versions_trl": theirs["versions"],
        "largest_difference": differences,
        "ours": mine,
        "trl": theirs["steps"],
    }


if __name__ == "__main__":
    beside_trl.main(RUNS, 12, compare)
