"""The training loop.

A step computes the gradient of the mean loss over all its labelled tokens, however many micro-batches and GPUs they are
spread over, clips it and updates the weights. After it comes what is due: an evaluation, a checkpoint, a snapshot, a
stop.
"""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

from tunery.spec import EarlyStopping, Plan
from tunery.trainer_protocol import CheckpointSaved, Evaluated, Step
from worker.trainer import checkpoints, finite, validation
from worker.trainer.data import move
from worker.trainer.methods.method import Shown
from worker.trainer.replay import mixing
from worker.trainer.scoring import sampled
from worker.trainer.training import Progress, Training


def train(t: Training, progress: Progress) -> bool:
    """Trains from `progress` to the end. Returns False if it was asked to stop; a snapshot then holds all its state.

    Raises NotFinite before a step with a loss or gradient that is not finite changes a weight, and before weights that
    are not finite are saved.
    """
    t.objective.train()
    saved_at = time.monotonic()
    before, first = _sample(t.parameters.values()), progress.step
    while progress.step < t.total_steps and not progress.stopped_early:
        began, tokens = time.monotonic(), progress.tokens
        # Clocks differ, and a rank that saved alone would wait for the others in the middle of their next step: the
        # ranks agree in the step, as a question of its own would wait for the GPU.
        message, asked, due = _take_step(t, progress, due=began - saved_at > t.run.snapshot_seconds)
        seconds = time.monotonic() - began
        progress.seconds += seconds
        quick = _quick_validation(t, progress.step)
        t.timer.take_step(progress.step, time.monotonic() - began, progress.tokens - tokens)
        t.writer.write(message.model_copy(update={"seconds": seconds, "seconds_left": t.timer.left()} | quick))
        if progress.step == first + 3:
            _check_moved(t.parameters.values(), before)
        if _evaluation_due(t, progress.step):
            with t.timer.measure("validation"):
                _evaluate(t, progress)
        if progress.step % t.steps_per_epoch == 0:
            finite.check_weights(t, progress.step, message.learning_rate)
            with t.timer.measure("checkpoint"):
                _save_public(t, progress)
        _compare_products(t, progress)
        if asked:
            _save_snapshot(t, progress)
            return False
        if due:
            _save_snapshot(t, progress)
            saved_at = time.monotonic()
    t.timer.trained = True
    if t.keeps_best:
        checkpoints.restore_best(t, progress)
    return True


def learning_rate(plan: Plan, step: int, total: int) -> float:
    """Returns the rate of a step (1 to total): a linear warmup, then the schedule's decay. It is never zero.

    A decay to a `min_ratio` above 0 reaches it at the last step; a decay to 0 one step later, so that no step is lost.
    """
    schedule, done = plan.schedule, step - 1
    warmup = round(schedule.warmup_ratio * total)
    if done < warmup:
        return plan.learning_rate * (done + 1) / (warmup + 1)
    falls = total - warmup - (1 if schedule.min_ratio else 0)
    fraction = (done - warmup) / max(1, falls)
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * fraction)), "linear": 1 - fraction, "constant": 1.0}[schedule.type]
    return plan.learning_rate * (schedule.min_ratio + (1 - schedule.min_ratio) * fall)


def _take_step(t: Training, progress: Progress, *, due: bool = False) -> tuple[Step, bool, bool]:
    """Does one optimizer step; returns its message, and whether any rank was asked to stop, or has a snapshot `due`."""
    step = progress.step + 1
    drawn = mixing.examples_of_step(t.rows, step, t.plan.batch_size, t.plan.seed)
    rate = learning_rate(t.plan, step, t.total_steps)
    weight = t.stepper.weight(drawn)
    sums = t.stepper.accumulate(drawn, weight)
    norm = t.stepper.clip(t.plan.max_grad_norm)
    if step < t.total_steps:
        t.stepper.prepare(mixing.examples_of_step(t.rows, step + 1, t.plan.batch_size, t.plan.seed))
    flags = move(torch.tensor([t.stop_signal.received, due], dtype=sums.dtype), sums.device)
    sums = t.ranks.sum(torch.cat([sums, flags]))
    *totals, asked, overdue, grad_norm = torch.cat([sums, norm.double().reshape(1)]).tolist()
    loss, accuracy, metrics = _shown(t, totals, weight)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        what = f"The loss became {loss}" if not math.isfinite(loss) else f"The gradient's norm became {grad_norm}"
        raise finite.failure(t, what=what, step=step, rate=rate, drawn=drawn)
    t.stepper.update(step, rate)
    progress.step = step
    progress.tokens += sum(t.rows.lengths[i] for i in drawn)
    message = Step(
        step=step,
        epoch=step / t.steps_per_epoch,
        train_loss=loss,
        train_accuracy=accuracy,
        train_metrics=metrics,
        learning_rate=rate,
        grad_norm=grad_norm,
        tokens=progress.tokens,
        seconds=0,
    )
    return message, asked > 0, overdue > 0


def _compare_products(t: Training, progress: Progress) -> None:
    """Compares products in eight bits with wide ones from time to time, and drops those that differ too much."""
    if (
        t.eight_bits is not None
        and t.eight_bits.due(progress.step)
        and not t.eight_bits.check(t.ranks, t.stepper.between_steps)
    ):
        progress.wide = dict(t.eight_bits.wide)
        t.stepper.record_again()


def _shown(t: Training, totals: list[float], weight: float) -> Shown:
    """Returns a step's measures from its sums over all ranks, whose loss is a mean already."""
    method = t.objective.method
    named = zip(method.sums, totals, strict=True)
    return method.shown({name: total if name == "loss" else total / weight for name, total in named})


def _quick_validation(t: Training, step: int) -> dict[str, Any]:
    """Returns the measures of one batch of the validation file, every tenth step or thirtieth of the run."""
    every = max(10, t.total_steps // 30)
    if t.valid is None or (step % every and step != t.total_steps):
        return {}
    size = t.plan.batch_size
    start = (step // every * size) % max(1, len(t.valid.examples) - size + 1)
    loss, accuracy, metrics = validation.loss(t.stepper, t.valid.examples[start : start + size])
    return {"valid_loss": loss, "valid_accuracy": accuracy, "valid_metrics": metrics}


def _evaluation_due(t: Training, step: int) -> bool:
    every = t.plan.evaluation.every_steps
    every = t.steps_per_epoch if every == "auto" else every
    return t.valid is not None and (step % every == 0 or step == t.total_steps)


def _evaluate(t: Training, progress: Progress) -> None:
    """Measures the full validation loss and the task's score; records the best step and whether to stop early.

    The best step has the lowest loss, by however little. A gain below `min_delta` does not reset the patience. If the
    task chooses, the loss is 1 minus its score. Raises NotFinite.
    """
    assert t.valid is not None
    loss, accuracy, metrics = validation.loss(t.stepper, t.valid.examples)
    task = sampled.measure(t) if math.isfinite(loss) else {}
    t.writer.write(Evaluated(step=progress.step, loss=loss, accuracy=accuracy, metrics=metrics, **task))
    if not math.isfinite(loss):
        rate = learning_rate(t.plan, progress.step, t.total_steps)
        raise finite.failure(t, what=f"The validation loss became {loss}", step=progress.step, rate=rate)
    if t.chooses_by_task:
        loss = 1 - task["task_score"]
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        if t.keeps_best:
            checkpoints.keep_best(t)
    _wear_patience(t.plan.early_stopping, progress, loss)


def _wear_patience(stopping: EarlyStopping | None, progress: Progress, loss: float) -> None:
    """Counts evaluations since the loss last fell by more than `min_delta`; at `patience` the run stops early."""
    least_gain = stopping.min_delta if stopping else 0.0
    if progress.gained_loss is None or loss < progress.gained_loss - least_gain:
        progress.gained_loss, progress.stale = loss, 0
    else:
        progress.stale += 1
        progress.stopped_early = stopping is not None and progress.stale >= stopping.patience


def _save_public(t: Training, progress: Progress) -> None:
    if t.run.public_checkpoints:
        path = checkpoints.save_public(t, progress)
        t.writer.write(CheckpointSaved(kind="public", step=progress.step, path=path))


def _save_snapshot(t: Training, progress: Progress) -> None:
    finite.check_weights(t, progress.step, learning_rate(t.plan, progress.step, t.total_steps))
    path = checkpoints.save_snapshot(t, progress)
    t.writer.write(CheckpointSaved(kind="snapshot", step=progress.step, path=path))


def _sample(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns some elements of every trained tensor."""
    return torch.cat([p.detach().reshape(-1)[:64].float().cpu() for p in parameters])


def _check_moved(parameters: Iterable[torch.Tensor], before: torch.Tensor) -> None:
    """Raises RuntimeError if three steps changed no weight, as when the optimizer holds other tensors."""
    if torch.equal(before, _sample(parameters)):
        raise RuntimeError("three optimizer steps changed no weight: the optimizer does not have the model's weights")
