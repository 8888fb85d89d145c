"""Messages to the pipe, and the metrics and versions that an artifact records."""

import csv
import json
import os
import platform
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tunery.spec import Run
from tunery.trainer_protocol import Evaluated, Step

CSV_HEADER = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers")


class MessageWriter:
    """Writes messages to a file descriptor, one JSON object a line, and keeps those that are metrics.

    Only rank 0 has a descriptor; other ranks just keep their metrics.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.metrics: list[dict[str, Any]] = []

    def write(self, message: BaseModel) -> None:
        """Writes one message. Raises BrokenPipeError if the supervisor has closed the pipe."""
        line = message.model_dump_json()
        if isinstance(message, Step | Evaluated):
            self.metrics.append(json.loads(line))
        if self._descriptor is not None:
            with self._lock:
                _write_all(self._descriptor, line.encode() + b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_results(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Writes the CSV that the API serves as a result file: a line per step, with empty cells if nothing was measured.

    It has OpenAI's columns, then the method's own.
    """
    steps = [entry for entry in metrics if entry["type"] == "step"]
    own = [(part, name) for part in ("train", "valid") for name in (steps[0].get("train_metrics", {}) if steps else ())]
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(CSV_HEADER + [f"{part}_{name}" for part, name in own])
        for entry in steps:
            cells = [entry[k] for k in ("step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy")]
            cells += [entry[f"{part}_metrics"].get(name) for part, name in own]
            table.writerow("" if cell is None else _short(cell) for cell in cells)


def _short(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float) else str(value)


def describe(run: Run, template_sha256: str, **measured: Any) -> dict[str, Any]:
    """Returns the content of `training_config.json`: the whole plan, the hardware and versions, and the results."""
    return {
        "base_model": run.base_model,
        "job": run.job,
        "plan": run.plan.model_dump(mode="json"),
        "chat_template_sha256": template_sha256,
        "versions": versions(),
        "facts": run.facts,
        **measured,
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
