"""Runs Tunery's loop on fixed rows; prints one JSON line of tokens a second, peak memory, losses and gradient norms."""

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from bench.train_rows import SEED, rows
from tunery.planning.precision import decide
from tunery.rows.template import ChatTemplate
from tunery.spec import Full, Lora, Plan, Qlora, Run, Schedule
from worker.trainer.data import Rows, singles
from worker.trainer.kernels import adapters
from worker.trainer.loading import RECIPES
from worker.trainer.loop import train
from worker.trainer.memory import MemoryPlan
from worker.trainer.objective import Objective, all_and_trainable
from worker.trainer.parallel import Ranks
from worker.trainer.report import MessageWriter
from worker.trainer.stepper import Stepper
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

TECHNIQUES = {"full": Full(), "lora": Lora(), "qlora": Qlora()}


def set_up(model: Path, method: str, checkpointing: bool, made: Rows, batch: int, narrow: bool) -> Training:
    accelerator = Accelerator()
    torch.manual_seed(SEED)
    technique = TECHNIQUES[method]
    plan = Plan(technique=technique, n_epochs=1, batch_size=batch, learning_rate=1e-4, learning_rate_multiplier=1,
                schedule=Schedule(type="constant", warmup_ratio=0), seed=SEED)  # fmt: skip
    recipe = RECIPES[method]
    precision = decide(technique, accelerator.device.type)
    base = recipe.load_base(model, precision, accelerator.device)
    objective = Objective(recipe.prepare(base, technique, None), precision)
    if narrow:
        adapters.narrow(objective.model)
    if checkpointing:
        objective.recompute()
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = recipe.make_optimizer(parameters, plan, precision)
    memory = MemoryPlan(batch * max(made.lengths), recompute=objective.recomputes)
    stepper = Stepper(objective, optimizer, list(parameters.values()), made, Ranks(accelerator), memory)
    return Training(
        run=Run(job="bench", base_model=model.name, plan=plan, public_checkpoints=0, snapshot_seconds=3600),
        folder=model, recipe=recipe, precision=precision, accelerator=accelerator, objective=objective,
        optimizer=optimizer, parameters=parameters,
        template=ChatTemplate.load(model), rows=made, valid=None,
        writer=MessageWriter(None), stop_signal=StopSignal(), stepper=stepper,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", choices=list(TECHNIQUES), required=True)
    parser.add_argument("--ckpt", type=int, default=1)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--bs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--skip", type=int, default=6)
    a = parser.parse_args()
    began = time.monotonic()
    t = set_up(a.model, a.method, bool(a.ckpt), Rows(singles(rows(a.steps * a.bs, a.seq))), a.bs, a.fp8)
    loaded = time.monotonic() - began
    torch.cuda.reset_peak_memory_stats()
    train(t, Progress())
    steps = t.writer.metrics
    seconds = sum(step["seconds"] for step in steps[a.skip :])
    print("RESULT " + json.dumps({
        "stack": "tunery", "method": a.method, "ckpt": a.ckpt, "fp8": a.fp8, "seq": a.seq, "bs": a.bs, "steps": a.steps,
        "optim": type(t.optimizer).__name__, "tok_s": round((a.steps - a.skip) * a.bs * a.seq / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "load_s": round(loaded, 1),
        "losses": [round(step["train_loss"], 4) for step in steps],
        "grad_norms": [round(step["grad_norm"], 4) for step in steps],
        "trainable": all_and_trainable(t.objective.model)[1],
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
