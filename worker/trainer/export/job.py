"""The exports that a job asks for, made at its end."""

import itertools
from pathlib import Path

import torch

from tunery.spec import Full
from tunery.wire import Phase
from worker.trainer.data import Row, read_rows
from worker.trainer.export import files, readme, work
from worker.trainer.training import Training


def write(t: Training, artifact: Path) -> None:
    """Writes the job's exports into folders of `artifact`, and how to serve all of it. Where there are exports, the
    model in memory is gone afterwards."""
    if t.plan.export.is_asked:
        t.voice.say(Phase(phase="exporting"))
        _release(t)
        work.carry_out(_work(t, artifact))
    readme.write(t, artifact)


def _work(t: Training, artifact: Path) -> work.Work:
    return work.Work(
        asked=t.plan.export,
        name=t.run.job,
        base=t.folder / "base",
        artifact=artifact,
        out=artifact,
        is_whole=isinstance(t.plan.technique, Full),
        precision=t.precision,
        device=t.device,
        template=t.template,
        rows=lambda: _rows(t),
        say=t.voice.say,
    )


def _rows(t: Training) -> list[Row]:
    """Held-out rows first; training rows where those are few."""
    path = t.folder / "data" / "test.jsonl"
    test = read_rows(path, t.template, t.plan.max_seq_length, "test").rows if path.exists() else []
    valid = [] if t.valid is None else t.valid.rows
    return [*test, *valid, *t.rows.rows]


def _release(t: Training) -> None:
    """Frees the weights and the optimizer's state, so that the device has room for the base in fp32."""
    t.optimizer.state.clear()
    if t.shards is not None:
        t.shards.release()
        files.free_memory()
        return
    for tensor in itertools.chain(t.objective.parameters(), t.objective.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    files.free_memory()
