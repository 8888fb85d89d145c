"""Writes a run's artifact: its model with all its records, complete or not at all."""

import shutil

from tunery.trainer_protocol import Gated, Phase
from worker.trainer import checkpoints, event_files, gate, parity, previews, whole_folders
from worker.trainer.export import job as export
from worker.trainer.recipes.recipe import Weights
from worker.trainer.scoring import comparison
from worker.trainer.scoring.comparison import Scored
from worker.trainer.stop_signal import Stopped
from worker.trainer.training import Progress, Training


def write(t: Training, progress: Progress, scored: Scored | None) -> None:
    """Writes the gate's verdict, then the artifact, on rank 0. Raises Stopped on all ranks."""
    verdict = None
    if t.plan.gate is not None:
        verdict = gate.judge(t.plan.gate, None if scored is None else scored[0])
        t.writer.write(verdict)
    t.writer.write(Phase(phase="saving", seconds_left=t.timer.left()))
    with t.ranks.lockstep():
        answered = parity.measure(t) if t.ranks.is_main else None
    if t.plan.export.is_asked:
        checkpoints.save_for_later(t, progress)  # exports free the weights, and may be stopped or killed
    weights = checkpoints.whole_weights(t)
    stopped = False
    if answered is not None:
        try:
            _write(t, progress, scored, verdict, answered, weights)
        except Stopped:
            stopped = True
    t.ranks.wait()
    if t.ranks.any(stopped):
        raise Stopped


def _write(
    t: Training,
    progress: Progress,
    scored: Scored | None,
    verdict: Gated | None,
    answered: parity.Record,
    weights: Weights | None,
) -> None:
    """Writes the artifact to `out/`, which exists only when it is complete."""
    partial = t.folder / ".out.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with whole_folders.room_for("the model", t.folder / "snapshots", partial):
        partial.mkdir()
        comparison.write(scored, partial)
        if verdict is not None:
            (partial / "gate.json").write_text(verdict.model_dump_json(indent=2, exclude={"type"}) + "\n")
        checkpoints.write_artifact(t, progress, partial, weights)
        event_files.write(partial, t.writer.metrics)
        previews.write(t, partial)
        parity.write(t, answered, partial)
        export.write(t, partial)
    shutil.rmtree(t.folder / "out", ignore_errors=True)
    partial.rename(t.folder / "out")
