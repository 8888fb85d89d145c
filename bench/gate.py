"""Whether the gate catches what the task's score hides: LoRA on Banking at a good rate and at one that is too high.

`python -m bench.gate BASE OUT.json`: BASE a converted SmolLM2-135M-Instruct. The trainer trains, as in a job, with a
gate, 3 epochs at each rate. Too high a rate keeps the task's score and loses a fifth of the general one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench import task_runs
from bench.train_side_by_side import hardware
from tunery.spec import Gate, Lora

RATES = {"good": 1.3e-3, "too high": 3e-3}
GATE = Gate(min_task_gain=0.5, max_general_drop=0.03, max_kl=1.0)


def line(name: str, run: dict[str, Any]) -> str:
    """A row of the table."""
    if "failed" in run:
        return f"| {name} | failed: {run['failed']} |"
    general, moved = run["general"], run["general"]["forgetting"]
    change = f"{100 * general['change_low']:+.1f} to {100 * general['change_high']:+.1f}"
    checks = ", ".join(f"{check['name']} {check['status']}" for check in run["gate"]["checks"])
    return (
        f"| {name} | {run['learning_rate']:g} | {run['exact_tuned']:.1%} | {general['base_accuracy']:.1%} | "
        f"{general['tuned_accuracy']:.1%} ({change}) | "
        f"{moved['kl']:.3f} ({moved['kl_low']:.3f} to {moved['kl_high']:.3f}) | "
        f"{moved['base_nll']:.3f}, {moved['tuned_nll']:.3f} | {run['gate']['status']} ({checks}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    print("| rate | value | exact | general, base | general, tuned | KL | loss on prompts, before and after | gate |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    runs = {}
    for name, rate in RATES.items():
        work = task_runs.Work(a.base, "banking", Lora(), a.seed, 3, learning_rate=rate, gate=GATE)
        runs[name] = task_runs.train(work)
        print(line(name, runs[name]), flush=True)
    found = {**hardware(), "gate": GATE.model_dump(), "runs": runs}
    a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
