"""Writes the run's measurements as a TensorBoard event file, so that TensorBoard can compare several runs."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
NAME = "events.out.tfevents.0.tunery"
"""TensorBoard recognises its files by the middle part. Why not the library's own name: it contains the host's name."""
_STEP = ("learning_rate", "grad_norm", "tokens", "seconds")


def write(artifact: Path, metrics: list[dict[str, Any]]) -> None:
    """Writes `tensorboard/` into the artifact. `metrics`: the run's messages of steps and evaluations, in order.

    A resumed run's messages include those from before it stopped, so it is one curve.
    """
    try:  # imported here, as it takes half a second and may not be installed beside the trainer
        from tensorboardX import SummaryWriter
    except ImportError:
        log.warning("%s/ is not written: tensorboardX is not installed", FOLDER)
        return
    folder = artifact / FOLDER
    writer = SummaryWriter(logdir=str(folder))
    now = time.time() - sum(entry.get("seconds", 0) for entry in metrics)
    for entry in metrics:
        now += entry.get("seconds", 0)
        for name, value in scalars(entry):
            writer.add_scalar(name, value, entry["step"], walltime=now)
    writer.close()
    next(folder.iterdir()).rename(folder / NAME)


def scalars(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the measurements of a step or an evaluation, by the names under which TensorBoard draws them.

    Entries from a snapshot of an earlier release lack what that release did not measure.
    """
    if entry["type"] == "evaluated":
        found = _measured("full_valid", entry["loss"], entry["accuracy"], entry.get("metrics", {}))
        found[f"task/{entry.get('task_metric')}"] = entry.get("task_score")
    else:
        found = _measured("train", entry["train_loss"], entry["train_accuracy"], entry.get("train_metrics", {}))
        found |= {f"run/{name}": entry[name] for name in _STEP}
        found |= _measured("valid", entry["valid_loss"], entry["valid_accuracy"], entry.get("valid_metrics", {}))
    return ((name, float(value)) for name, value in found.items() if value is not None)


def _measured(part: str, loss: float | None, accuracy: float | None, own: dict[str, float]) -> dict[str, Any]:
    named = {"loss": loss, "accuracy": accuracy} | own
    return {f"{part}/{name}": value for name, value in named.items()}
