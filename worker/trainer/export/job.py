"""Makes the exports that a job requests, at its end."""

import itertools
from pathlib import Path

import torch

from tunery.rows.encoding import find_encoder
from tunery.spec import Full
from tunery.trainer_protocol import Phase
from worker.trainer.data import Row, read_rows
from worker.trainer.export import files, proof, readme, work
from worker.trainer.training import Training


def write(t: Training, artifact: Path) -> None:
    """Writes the job's exports to folders of `artifact`, and a README on serving them. If there are exports, the model
    in memory is released. Raises Stopped.
    """
    if t.plan.export.is_asked:
        t.writer.write(Phase(phase="exporting", seconds_left=t.timer.exports_left()))
        _release(t)
        with t.stop_signal.breaking_off(), t.timer.measure("exports"):
            work.carry_out(_work(t, artifact))
    readme.write(t, artifact)


def expect(t: Training) -> None:
    """Adds the exports to the run's time estimate: bytes of whole models, and rows that pass through them as proof."""
    asked = t.plan.export
    if not asked.is_asked:
        return
    quantised = t.precision.quantised
    merges = 0 if isinstance(t.plan.technique, Full) or not asked.needs_merge else 2 if quantised else 1
    # A merge reads the base, then writes and reads the whole model; a file is written and read beside the whole model.
    models = 3 * merges + (quantised and merges > 0) + 2 * len(asked.gguf) + 3 * asked.fp8
    passes = 2 * merges + (quantised and merges > 0) + len(asked.gguf) + bool(asked.gguf) + 2 * asked.fp8
    whole = 2 * files.parameters(t.folder / "base")
    vocabulary = t.objective.causal.config.get_text_config().vocab_size
    tokens = sum(len(row.input_ids) for row in proof.choose(t.rows.rows, vocabulary))
    t.timer.expect_exports(bytes=models * whole, tokens=passes * tokens)


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
        say=t.writer.write,
        check=t.stop_signal.check,
    )


def _rows(t: Training) -> list[Row]:
    """Returns held-out rows first, then training rows if those are few."""
    path = t.folder / "data" / "test.jsonl"
    test = (
        read_rows(
            path, t.template, t.plan.max_seq_length, "test", find_encoder(t.plan.method, "test", t.plan.columns)
        ).rows
        if path.exists()
        else []
    )
    valid = [] if t.valid is None else t.valid.rows
    # Each row has at least one label, so a proof reads no more rows.
    return list(itertools.islice(itertools.chain(test, valid, t.rows.rows), proof.POSITIONS))


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
