"""The exports that a job asks for, made at its end from the artifact's own files.

A model is worth more than its exports: one that is refused or breaks is left out with its reason, and the job succeeds.
"""

import itertools
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tunery.spec import Full
from tunery.wire import Exported, Phase
from worker.trainer.data import Row, read_rows
from worker.trainer.export import files, merge, readme
from worker.trainer.export.errors import ExportRefused
from worker.trainer.training import Training

log = logging.getLogger(__name__)


def write(t: Training, artifact: Path) -> None:
    """Writes the job's exports into folders of `artifact`, and how to serve all of it. Where there are exports, the
    model in memory is gone afterwards."""
    if t.plan.export.is_asked:
        t.voice.say(Phase(phase="exporting"))
        _release(t)
        _write_all(t, artifact)
    readme.write(t, artifact)


def _write_all(t: Training, artifact: Path) -> None:
    if isinstance(t.plan.technique, Full):
        _write_gguf(t, artifact, artifact)
        return
    if t.plan.export.adapter_gguf:
        _write_adapter(t, artifact)
    if not t.plan.export.needs_merge:
        return
    with files.temporary_folder(artifact / "merged") as folder:
        if _try(t, "merged", lambda: _merge(t, artifact, folder / "merged")):
            _write_gguf(t, folder / "merged", artifact)
            if t.plan.export.merged:
                (folder / "merged").rename(artifact / "merged")


def _try(t: Training, path: str, make: Callable[[], str]) -> bool:
    """Says what `make` says of the export, or why there is none; whether there is one."""
    try:
        message, is_refused = make(), False
    except ExportRefused as error:
        message, is_refused = error.message, True
    except Exception as error:
        log.exception("the export %s broke", path)
        message, is_refused = f"It broke: {type(error).__name__}: {error}. The job's log has more.", True
    (log.warning if is_refused else log.info)("export %s: %s", path, message)
    t.voice.say(Exported(path=path, message=message, is_refused=is_refused))
    return not is_refused


def _merge(t: Training, artifact: Path, out: Path) -> str:
    source = merge.Source(t.folder / "base", artifact, t.precision, t.device)
    return merge.summary(merge.write(source, _rows(t), out))


def _write_gguf(t: Training, model: Path, artifact: Path) -> None:
    """Writes the GGUF files of the whole model in `model` into the artifact."""
    from worker.trainer.export import gguf_writer  # only here: other runs have no need of it

    for kind in dict.fromkeys(t.plan.export.gguf):
        _write_file(t, artifact, f"model-{kind}.gguf", partial(gguf_writer.write, model, kind=kind, name=t.run.job))


def _write_adapter(t: Training, artifact: Path) -> None:
    from worker.trainer.export import gguf_adapter

    make = partial(gguf_adapter.write, t.folder / "base", artifact, name=t.run.job)
    _write_file(t, artifact, "adapter-f32.gguf", make)


def _write_file(t: Training, artifact: Path, name: str, make: Callable[..., str]) -> None:
    """Writes a file into gguf/; what an export that was refused leaves of it is removed."""
    path = artifact / "gguf" / name
    path.parent.mkdir(exist_ok=True)
    if not _try(t, f"gguf/{name}", lambda: make(out=path)):
        path.unlink(missing_ok=True)
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


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
