"""The exports that a job asks for, made at its end from the artifact's own files.

A model is worth more than its exports: one that is refused or breaks is left out with its reason, and the job succeeds.
"""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from tunery.wire import Exported, Phase
from worker.trainer.data import Row, read_rows
from worker.trainer.export import files, merge
from worker.trainer.export.errors import ExportRefused
from worker.trainer.training import Training

log = logging.getLogger(__name__)


def write(t: Training, artifact: Path) -> None:
    """Writes the job's exports into folders of `artifact`. Afterwards the model in memory is gone."""
    if not t.plan.export.is_asked or not t.ranks.is_main:
        return
    t.voice.say(Phase(phase="exporting"))
    _release(t)
    if t.plan.export.merged:
        _try(t, "merged", lambda: _merge(t, artifact))


def _try(t: Training, path: str, make: Callable[[], str]) -> None:
    """Says what `make` says of the export, or why there is none."""
    try:
        message, is_refused = make(), False
    except ExportRefused as error:
        message, is_refused = error.message, True
    except Exception as error:
        log.exception("the export %s broke", path)
        message, is_refused = f"It broke: {type(error).__name__}: {error}. The job's log has more.", True
    (log.warning if is_refused else log.info)("export %s: %s", path, message)
    t.voice.say(Exported(path=path, message=message, is_refused=is_refused))


def _merge(t: Training, artifact: Path) -> str:
    source = merge.Source(t.folder / "base", artifact, t.precision, t.device)
    record = merge.write(source, _rows(t), artifact / "merged")
    return merge.summary(record)


def _rows(t: Training) -> list[Row]:
    """Held-out rows first; training rows where those are few."""
    path = t.folder / "data" / "test.jsonl"
    test = read_rows(path, t.template, t.plan.max_seq_length, "test").rows if path.exists() else []
    valid = [] if t.valid is None else t.valid.rows
    return [*test, *valid, *t.rows.rows]


def _release(t: Training) -> None:
    """Frees the weights and the optimizer's state, so that the device has room for the base in fp32."""
    t.optimizer.state.clear()
    for tensor in itertools.chain(t.objective.parameters(), t.objective.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    files.free_memory()
