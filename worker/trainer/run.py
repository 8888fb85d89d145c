"""One run, in order, from its directory to its artifact."""

import gc
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tunery.rows.template import ChatTemplate
from tunery.spec import Run
from tunery.trainer_protocol import Finished, Latency, Paused, Phase, Spent, Started
from worker.trainer import (
    artifact,
    checkpoints,
    coverage,
    eight_bits,
    hardware,
    loading,
    parallel,
    parity,
    paths,
    reading,
    reference,
)
from worker.trainer.data import Rows
from worker.trainer.export import job as export
from worker.trainer.general import measure as general
from worker.trainer.loop import train
from worker.trainer.objective import all_and_trainable
from worker.trainer.parallel import Ranks
from worker.trainer.replay import mixing, own
from worker.trainer.replay import rows as replay
from worker.trainer.report import MessageWriter
from worker.trainer.scoring import comparison, latency, sampled
from worker.trainer.step_timer import Part
from worker.trainer.stop_signal import Stopped, StopSignal
from worker.trainer.training import Progress, Training

log = logging.getLogger(__name__)

FORESEEN_STEPS, FORESEEN_TOKENS = 400, 2**20
"""The most steps of which the passes are recorded before the first one, and their most tokens: the host needs a
millisecond to build the batches of 2,000 tokens.
"""


def carry_out(folder: Path, writer: MessageWriter, stop_signal: StopSignal) -> bool:
    """Trains as `folder/spec.json` says. Returns False if it was asked to stop: it can be resumed, and nothing is lost.

    Raises JobFailure for errors that the user can correct, and any other exception for other errors.
    """
    began = time.monotonic()
    writer.write(Phase(phase="loading"))
    t = prepare(folder, writer, stop_signal)
    progress, timed = Progress(), None
    try:
        t.timer.check_bytes = parity.bytes_to_read(t)
        export.expect(t)
        asked, probe = _questions(t)
        base_answers = comparison.answers_before_training(t, asked)
        base_general = comparison.general_before_training(t, probe)
        reference.attach(t)
        progress = _resume(t)
        _announce(t, progress)
        with _few_collections():
            record_ahead(t, progress)
            writer.write(Phase(phase="training"))
            t.timer.end_preparation(time.monotonic() - began)
            done = train(t, progress)
        if done:
            t.stepper.rest()
            scored = comparison.score(
                t, asked, base_answers, lambda: comparison.compare_general(t, probe, base_general)
            )
            timed = latency.measure(t, asked, scored)
            artifact.write(t, progress, scored)
    except Stopped:
        done = False
        checkpoints.save_for_later(t, progress)
    if done:
        writer.write(_finished(t, progress, began, timed))
    else:
        writer.write(_paused(folder, progress))
    return done


@contextmanager
def _few_collections() -> Iterator[None]:
    """Keeps Python's collector from going through all that was made before, which takes the time of a step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def score(folder: Path, writer: MessageWriter, stop_signal: StopSignal) -> comparison.Scored | None:
    """Compares the adapter in `folder` with its base on the test rows, as after training. Raises JobFailure."""
    t = prepare(folder, writer, stop_signal)
    asked, probe = _questions(t)
    return comparison.score(t, asked, None, lambda: comparison.compare_general(t, probe, None))


def prepare(folder: Path, writer: MessageWriter, stop_signal: StopSignal) -> Training:
    """Loads the spec, the rows and the model, and plans how steps are split into micro-batches."""
    run = Run.model_validate_json((folder / "spec.json").read_text())
    ranks = Ranks(parallel.accelerator())
    template = ChatTemplate.load(checkpoints.texts(folder), now=run.now)
    rows, valid, measured = _read(folder, run, template)
    ranks.check(stop_signal)
    loaded = loading.load(folder, run, template, rows, ranks)
    ranks, objective, precision = loaded.ranks, loaded.objective, loaded.precision
    ranks.check(stop_signal)
    covered = coverage.describe(objective.model, run.plan.technique, quantised=precision.quantised)
    warnings = coverage.warnings(covered)
    base_now = own.Base(folder, objective, template, precision, ranks, writer, stop_signal, measured)
    rows, replayed = replay.add(rows, run.plan, base_now, warnings)
    narrow = eight_bits.install(objective, precision, rows.examples, ranks, warnings)
    packs = reading.packs(run, rows, objective, warnings)
    objective.add_noise(run.plan.neftune_noise_alpha)
    optimizer = loaded.recipe.make_optimizer(loaded.parameters, run.plan, precision)
    stepper = loading.make_stepper(loaded, optimizer, rows, reading.work(run, rows, valid, packs, ranks.count))
    objective.rest()
    parallel.draw_apart(ranks, run.plan.seed)
    return Training(
        run=run,
        folder=folder,
        recipe=loaded.recipe,
        precision=precision,
        accelerator=ranks.accelerator,
        objective=objective,
        optimizer=optimizer,
        parameters=loaded.parameters,
        template=template,
        rows=rows,
        valid=valid,
        writer=writer,
        stop_signal=stop_signal,
        stepper=stepper,
        warnings=tuple(warnings),
        task_questions=sampled.questions(folder, run.plan, template),
        eight_bits=narrow,
        replayed=replayed,
        measured=measured,
    )


def _read(folder: Path, run: Run, template: ChatTemplate) -> tuple[Rows, Rows | None, dict[Part, Spent]]:
    """Returns the training and the validation rows, and the time that they took. Raises InvalidTrainingFile."""
    began = time.monotonic()
    rows, valid = reading.training_rows(folder, run, template), reading.validation_rows(folder, run, template)
    files = [rows] if valid is None else [rows, valid]
    if any(found.found for found in files):  # says nothing of a run that has to prepare them: it counts as preparation
        return rows, valid, {"rows": Spent(seconds=0, units=0)}
    spent = Spent(seconds=time.monotonic() - began, units=sum(found.tokens for found in files))
    return rows, valid, {"rows": spent}


def _questions(t: Training) -> tuple[comparison.Asked, general.Probe | None]:
    """Returns the scorecard's questions for both models and the general benchmark's; nothing without a test file."""
    if t.plan.evaluation.test_file is None:
        return [], None
    with t.timer.measure_rest("scores"):
        asked = comparison.questions(t)
        return asked, general.prepare(t) if asked else None


def _resume(t: Training) -> Progress:
    snapshot = checkpoints.find_snapshot(t)
    if snapshot is None:
        return Progress()
    progress = checkpoints.restore(t, snapshot)
    if t.eight_bits is not None:
        t.eight_bits.widen(progress.wide)
    log.info("resuming after step %d of %s", progress.step, snapshot)
    return progress


def record_ahead(t: Training, progress: Progress) -> None:
    """Records the passes of the next steps, if they are recorded."""
    of_a_step = t.rows.tokens_a_step(t.plan.batch_size, t.ranks.count)
    count = min(t.total_steps - progress.step, FORESEEN_STEPS, math.ceil(FORESEEN_TOKENS / of_a_step))
    steps = range(progress.step + 1, progress.step + count + 1)
    t.stepper.record_ahead(mixing.examples_of_step(t.rows, step, t.plan.batch_size, t.plan.seed) for step in steps)


def _announce(t: Training, progress: Progress) -> None:
    everything, trainable = all_and_trainable(t.objective.model)
    log.info(
        "trainable params: %s || all params: %s || trainable: %.2f%%",
        f"{trainable:,}", f"{everything:,}", 100 * trainable / everything,
    )  # fmt: skip
    log.info("memory plan: %s", t.stepper.memory)
    log.info("paths: %s", json.dumps(paths.describe(t)))
    for warning in t.warnings:
        log.warning(warning)
    covered = coverage.of(t)
    log.info("linear weights: %s", json.dumps(covered))
    t.writer.write(
        Started(
            trainable_params=trainable,
            all_params=everything,
            total_steps=t.total_steps,
            first_step=progress.step + 1,
            examples=t.rows.count,
            train_tokens=t.rows.tokens,
            truncated_examples=len(t.rows.truncated),
            device=hardware.device_name(t.device),
            learning_share=covered["learning"],
            quantised_share=covered["quantised"],
            replay=t.replayed,
            warnings=list(t.warnings),
        )
    )


def _paused(folder: Path, progress: Progress) -> Paused:
    path = checkpoints.snapshot_path(folder, progress)
    return Paused(step=progress.step, path=str(path.relative_to(folder)) if path.exists() else None)


def _finished(t: Training, progress: Progress, began: float, timed: Latency | None) -> Finished:
    on_gpu = t.device.type == "cuda"
    if on_gpu:
        most = torch.cuda.max_memory_allocated(t.device), torch.cuda.max_memory_reserved(t.device)
        log.info("peak memory: %.2f GiB allocated, %.2f GiB reserved", *(size / 2**30 for size in most))
    exported = progress.best_step if t.keeps_best and progress.best_step is not None else progress.step
    return Finished(
        step=exported,
        steps=progress.step,
        trained_tokens=progress.tokens,
        seconds=time.monotonic() - began,
        peak_memory_bytes=max(t.ranks.gather(torch.cuda.max_memory_allocated(t.device))) if on_gpu else None,
        stopped_early=progress.stopped_early,
        spent=t.timer.spent(),
        step_times=t.timer.step_times,
        latency=timed,
    )
