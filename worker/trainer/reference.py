"""The reference of preference tuning: the initial model's log-probability of every row, measured once.

The run directory keeps the numbers, and every snapshot a link to them, so that a resumed attempt compares with exactly
the same ones: a GPU would not reproduce them to the last bit.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tunery.trainer_protocol import Phase
from worker.trainer import validation
from worker.trainer.data import Example, MicroBatch, Rows, collate
from worker.trainer.stepper import Stepper
from worker.trainer.training import Training

log = logging.getLogger(__name__)

NAME = "reference.safetensors"
_AT_ONCE = 512
"""Examples between two checks whether the run is asked to stop."""
Measured = list[list[float]]
"""The log-probabilities of each example's rows."""


def path(folder: Path) -> Path:
    """Returns the path of the numbers in a run directory."""
    return folder / "snapshots" / NAME


def attach(t: Training) -> None:
    """Sets every example's `reference`, if the method reads it. Raises Stopped.

    Call it while the weights are still the initial ones: a base with new adapters that are zero, or the adapter of a
    model that is trained further. That is why no adapter has to be switched off.
    """
    if not t.objective.method.reads_reference:
        return
    files = [rows for rows in (t.rows, t.valid) if rows is not None]
    numbers = _find(t, files)
    if t.ranks.any(numbers is None):
        t.writer.write(Phase(phase="measuring the reference"))
        with t.timer.measure("reference", sum(rows.tokens for rows in files)):
            numbers = [measure(t, rows.examples) for rows in files]
    assert numbers is not None
    _keep(t, files, numbers)
    for rows, measured in zip(files, numbers, strict=True):
        rows.attach(measured)


def measure(t: Training, examples: Sequence[Example]) -> Measured:
    """Measures the examples by the current model. Every rank measures its part, and all get all. Raises Stopped."""
    found: Measured = []
    for start in range(0, len(examples), _AT_ONCE):
        t.ranks.check(t.stop_signal)
        part = list(examples[start : start + _AT_ONCE])
        mine = validation.over(t.stepper, part, partial(_log_probabilities, t.stepper, part))
        measured = {index: numbers for part in t.ranks.gather(mine) for index, numbers in part.items()}
        found += [measured[index] for index in range(len(part))]
    return found


def _log_probabilities(stepper: Stepper, examples: list[Example], parts: list[MicroBatch]) -> dict[int, list[float]]:
    """Returns the log-probabilities of the rows of each example in the micro-batches, by its index."""
    objective = stepper.objective
    found: dict[int, list[float]] = {}
    objective.eval()
    with torch.no_grad():
        for part in parts:
            batch = collate(examples, part, stepper.device, objective.pad_to, borders=objective.knows_borders)
            numbers = iter((-objective.row_losses(batch)).tolist())
            for index in (index for packed in part for index in packed):
                found[index] = [next(numbers) for _ in examples[index].rows]
    objective.train()
    return found


def _key(t: Training, files: list[Rows]) -> str:
    """Returns a digest of what the numbers depend on: the rows, the initial weights and their precision."""
    adapter = t.folder / "adapter" / "adapter_model.safetensors"
    parts = [rows.sha256 for rows in files] + [t.run.base_model, t.plan.technique.model_dump_json()]
    parts += [str(sorted(asdict(t.precision).items()))]
    if adapter.exists():
        parts.append(hashlib.sha256(adapter.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _find(t: Training, files: list[Rows]) -> list[Measured] | None:
    """Returns an earlier attempt's numbers, by file; None if there are none of this very run."""
    for kept in (path(t.folder), t.folder / "resume" / NAME):
        try:
            with safe_open(kept, "pt") as stored:
                if (stored.metadata() or {}).get("key") == _key(t, files):
                    return [_by_example(stored.get_tensor(str(i)).tolist(), rows) for i, rows in enumerate(files)]
            log.warning("%s is of another run: the reference is measured again", kept)
        except FileNotFoundError:
            continue
        except (SafetensorError, OSError):
            log.warning("%s is damaged: the reference is measured again", kept)
    return None


def _by_example(numbers: list[float], rows: Rows) -> Measured:
    each = iter(numbers)
    return [[next(each) for _ in example.rows] for example in rows.examples]


def _keep(t: Training, files: list[Rows], numbers: list[Measured]) -> None:
    """Writes the numbers, unless they are there, so that snapshots can include them."""
    kept = path(t.folder)
    if t.ranks.is_main:
        kept.parent.mkdir(exist_ok=True)
        tensors = {str(i): torch.tensor([n for example in found for n in example]) for i, found in enumerate(numbers)}
        save_file(tensors, kept.with_suffix(".partial"), {"key": _key(t, files)})
        kept.with_suffix(".partial").replace(kept)
    t.ranks.wait()
