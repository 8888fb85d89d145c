"""What a run writes down: recovery snapshots, public checkpoints and the artifact.

Safetensors and JSON only: a snapshot comes back from storage, and a pickle from there could run code. A directory is
written beside its name, flushed to the disk and renamed, so it is complete or absent.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from worker.trainer import report
from worker.trainer.training import Progress, Training

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
KEPT_SNAPSHOTS = 2
"""The newest may be on its way to storage while the next is written, so one older stays."""


def save_snapshot(t: Training, progress: Progress) -> str:
    """Everything that a run needs to go on as if it had not stopped; its path in the run directory."""

    def write(folder: Path) -> None:
        numbers, tensors = _flatten(t.optimizer.state_dict()["state"])
        save_file({name: _whole(p) for name, p in t.parameters.items()}, folder / "weights.safetensors")
        save_file(tensors | _random_state(), folder / "optimizer.safetensors")
        report.write_lines(folder / "metrics.jsonl", t.voice.metrics)
        if _best(t).exists():
            os.link(_best(t), folder / "best.safetensors")
        state = {
            "progress": asdict(progress),
            "optimizer": numbers,
            "budget": t.memory.max_tokens,
            "run": fingerprint(t),
        }
        digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / "state.json").write_text(json.dumps(state | {"sha256": digests}, indent=2))

    path = f"snapshots/step-{progress.step}"
    _write_whole(t.folder / path, write)
    _drop_old(t.folder / "snapshots", KEPT_SNAPSHOTS)
    return path


def find_snapshot(t: Training) -> Path | None:
    """The newest snapshot that belongs to this very run and is undamaged: of this directory, or `resume/`."""
    found = [*(t.folder / "snapshots").glob("step-*"), t.folder / "resume"]
    states = {folder: state for folder in found if (state := _read_state(folder)) is not None}
    for folder, state in sorted(states.items(), key=lambda item: -int(item[1]["progress"]["step"])):
        if damaged := [name for name, digest in state["sha256"].items() if not _is_whole(folder / name, digest)]:
            log.warning("snapshot %s is damaged (%s): an older one is taken", folder, ", ".join(damaged))
        elif state["run"] != fingerprint(t):
            log.warning("snapshot %s is of another plan or other rows: not used", folder)
        else:
            return folder
    return None


def _read_state(folder: Path) -> dict[str, Any] | None:
    """A snapshot's numbers; None where there are none that can be read."""
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        log.warning("snapshot %s is damaged (state.json): an older one is taken", folder)
        return None
    return state


def _is_whole(path: Path, digest: str) -> bool:
    return path.exists() and _sha256(path) == digest


def restore(t: Training, folder: Path) -> Progress:
    """Puts a snapshot's state in place: weights, optimizer, random numbers, metrics; gives how far it was."""
    state = json.loads((folder / "state.json").read_text())
    _load_weights(t, folder / "weights.safetensors")
    tensors = load_file(folder / "optimizer.safetensors")
    _set_random_state(tensors)
    t.optimizer.load_state_dict(t.optimizer.state_dict() | {"state": _unflatten(state["optimizer"], tensors)})
    t.voice.metrics[:] = report.read_lines(folder / "metrics.jsonl")
    most = min(t.memory.max_tokens, state["budget"]) if t.device.type == "cuda" else state["budget"]
    t.memory = replace(t.memory, max_tokens=most)
    _best(t).unlink(missing_ok=True)  # it may be of a later step than the snapshot
    if (folder / "best.safetensors").exists():
        _best(t).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "best.safetensors", _best(t))
    return Progress(**state["progress"])


def fingerprint(t: Training) -> str:
    """What must be equal for a snapshot to be this run's: the plan, the base's name and the very tokens."""
    digest = hashlib.sha256(json.dumps([t.plan.model_dump(mode="json"), t.run.base_model]).encode())
    for row in t.rows.rows:
        digest.update(torch.tensor([row.input_ids, row.labels]).numpy().tobytes())
    return digest.hexdigest()


def keep_best(t: Training) -> None:
    """Keeps the present weights as the best so far. A new file, so that snapshots linked to the old one keep theirs."""
    if t.accelerator.is_main_process:
        _best(t).parent.mkdir(exist_ok=True)
        partial = _best(t).with_suffix(".partial")
        save_file({name: _whole(p) for name, p in t.parameters.items()}, partial)
        partial.replace(_best(t))
    t.accelerator.wait_for_everyone()


def restore_best(t: Training) -> None:
    if _best(t).exists():
        _load_weights(t, _best(t))


def save_public(t: Training, progress: Progress) -> str:
    """The model as it is now, as a user would load it; its path in the run directory. Keeps the last few."""
    path = f"checkpoints/step-{progress.step}"
    _write_whole(t.folder / path, lambda folder: write_artifact(t, progress, folder))
    _drop_old(t.folder / "checkpoints", t.run.public_checkpoints)
    return path


def write_artifact(t: Training, progress: Progress, folder: Path) -> None:
    """The model in its own format, its tokenizer and template, its configuration and its metrics."""
    t.recipe.export(t.objective.model, folder, t.run.base_model)
    for name in TOKENIZER_FILES:
        if (t.folder / "base" / name).exists():
            shutil.copyfile(t.folder / "base" / name, folder / name)
    described = report.describe(t.run, t.template.sha256, progress=asdict(progress), warnings=t.warnings)
    (folder / "training_config.json").write_text(json.dumps(described, indent=2) + "\n")
    report.write_lines(folder / "metrics.jsonl", t.voice.metrics)
    report.write_results(folder / "results.csv", t.voice.metrics)


def _best(t: Training) -> Path:
    return t.folder / "snapshots" / "best.safetensors"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host with memory of its own: safetensors refuses tensors that share theirs."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _load_weights(t: Training, path: Path) -> None:
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in t.parameters.items():
            parameter.copy_(weights[name])


def _flatten(states: dict[Any, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An optimizer's state, nested as it may be, as numbers and tensors by `index.key` (or `index.key.key`)."""
    numbers: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, value in states.items():
        if isinstance(value, dict):
            inner_numbers, inner_tensors = _flatten(value, f"{prefix}{key}.")
            numbers |= inner_numbers
            tensors |= inner_tensors
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = _whole(value)
        else:
            numbers[f"{prefix}{key}"] = value
    return numbers, tensors


def _unflatten(numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, Any]]:
    states: dict[int, dict[str, Any]] = {}
    for name, value in {**numbers, **tensors}.items():
        index, *keys = name.split(".")
        if index.isdecimal():
            place = states.setdefault(int(index), {})
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = value
    return states


def _random_state() -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for file in partial.rglob("*"):
        _flush(file)
    _flush(partial)
    shutil.rmtree(path, ignore_errors=True)  # a run that went back to an older snapshot comes by here again
    partial.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _drop_old(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))[:-keep]:
        shutil.rmtree(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
