"""Writes and reads a run's recovery snapshots, public checkpoints and artifact.

Safetensors and JSON only: a snapshot comes back from storage, and a pickle from there could run code. A directory is
written under a temporary name, flushed to disk and renamed, so it is complete or absent.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from tunery import digests
from tunery.rows import template_files
from worker.trainer import coverage, fingerprint, hardware, paths, pieces, reference, report, whole_folders
from worker.trainer.recipes import recipe
from worker.trainer.replay import kept
from worker.trainer.stepper import Stepper
from worker.trainer.training import Progress, Training

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
VERSION = 2
"""Version of the snapshot format. Version 1, which recorded none, had the options as one hash and rank 0's state only.
"""
_OF_THIS_HOST = frozenset({"graphs", "host_embedding"})
"""Parts of a memory plan that a snapshot's does not replace."""
KEPT_SNAPSHOTS = 2
"""While the newest is being uploaded the next may be written, so the one before is kept."""


def save_snapshot(t: Training, progress: Progress) -> str:
    """Saves everything that a run needs to continue as if it had not stopped; returns the path in the run directory."""
    path, cut = f"snapshots/step-{progress.step}", _cut(t)
    weights = t.ranks.gather_state(t.parameters, cut)
    numbers, tensors = _flatten(_by_name(_names(t), t.optimizer.state_dict()["state"]))
    own = {key for key, value in tensors.items() if key.partition(":")[0] in cut and pieces.is_cut(key, value.shape)}
    moments = t.ranks.gather_state(tensors, own)
    ranks = t.ranks.gather((asdict(t.stepper.memory), _random_state()))
    if t.ranks.is_main:
        state = weights, numbers, moments
        whole_folders.write_whole(t.folder / path, lambda folder: _write_snapshot(t, progress, folder, state, ranks))
        whole_folders.drop_old(t.folder / "snapshots", KEPT_SNAPSHOTS)
    t.ranks.wait()
    return path


def save_for_later(t: Training, progress: Progress) -> None:
    """Saves a snapshot of the last step unless there is one: a run stopped while evaluating has finished training."""
    if progress.step and not t.ranks.any(snapshot_path(t.folder, progress).exists()):
        save_snapshot(t, progress)


def snapshot_path(folder: Path, progress: Progress) -> Path:
    """Returns the path of the last step's snapshot, whether or not it exists."""
    return folder / "snapshots" / f"step-{progress.step}"


def _write_snapshot(
    t: Training,
    progress: Progress,
    folder: Path,
    whole_state: tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]],
    ranks: list[tuple[dict[str, Any], dict[str, torch.Tensor]]],
) -> None:
    weights, numbers, tensors = whole_state
    random = {
        f"random.{rank}.{name}": state for rank, (_, states) in enumerate(ranks) for name, state in states.items()
    }
    save_file(weights, folder / "weights.safetensors")
    save_file(tensors | random, folder / "optimizer.safetensors")
    report.write_lines(folder / "metrics.jsonl", t.writer.metrics)
    if _best(t.folder).exists():
        os.link(_best(t.folder), folder / "best.safetensors")
    if reference.path(t.folder).exists():
        os.link(reference.path(t.folder), folder / reference.NAME)
    if kept.path(t.folder).exists():
        os.link(kept.path(t.folder), folder / kept.NAME)
    state = {
        "version": VERSION,
        "progress": asdict(progress),
        "run": fingerprint.describe(t.run, t.rows, t.precision),
        "optimizer": numbers,
        "memory": [memory for memory, _ in ranks],
        "cut_over": t.ranks.count if t.shards is not None else 1,
        "sha256": {path.name: digests.sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def find_snapshot(t: Training) -> Path | None:
    """Returns the newest undamaged snapshot of this very run, from this directory or `resume/`."""
    found = [*(t.folder / "snapshots").glob("step-*"), t.folder / "resume"]
    states = {folder: state for folder in found if (state := _read_state(folder)) is not None}
    for folder, state in sorted(states.items(), key=lambda item: -int(item[1]["progress"]["step"])):
        if damaged := [name for name, digest in state["sha256"].items() if not _is_whole(folder / name, digest)]:
            log.warning("snapshot %s is damaged (%s): using an older one", folder, ", ".join(damaged))
        elif state.get("version", 1) > VERSION:
            log.warning("snapshot %s was made by a newer release: not used", folder)
        elif (reason := fingerprint.difference(t.run, t.rows, t.precision, state)) is not None:
            log.warning("snapshot %s is not used: %s", folder, reason)
        elif _weight_names(folder) != set(t.parameters):
            log.warning("snapshot %s is not used: it has other trainable weights", folder)
        elif not _fits_cut(t, folder, state.get("cut_over", 1)):
            log.warning(
                "snapshot %s is not used: this number of ranks would split a block of its 8-bit moments", folder
            )
        else:
            return folder
    return None


def _weight_names(folder: Path) -> set[str]:
    """Returns the names of a snapshot's weights, which an earlier release may have chosen differently."""
    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        return set(file.keys())


def _read_state(folder: Path) -> dict[str, Any] | None:
    """Returns a snapshot's numbers; None if they cannot be read."""
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        log.warning("snapshot %s is damaged (state.json): using an older one", folder)
        return None
    return state


def _is_whole(path: Path, digest: str) -> bool:
    return path.exists() and digests.sha256(path) == digest


def restore(t: Training, folder: Path) -> Progress:
    """Restores a snapshot's weights, optimizer, random numbers and metrics; returns its progress."""
    state = json.loads((folder / "state.json").read_text())
    _load_weights(t.parameters, folder / "weights.safetensors")
    tensors = _read(folder / "optimizer.safetensors", t.parameters)
    if state.get("version", 1) == 1:
        state, tensors = _of_format_1(_names(t), state, tensors)
    _set_random_state(tensors, f"random.{t.ranks.index}.")
    states = _by_index(_names(t), _unflatten(state["optimizer"], tensors))
    t.optimizer.state.clear()  # before loading: two states of a large optimizer do not fit
    t.optimizer.load_state_dict(t.optimizer.state_dict() | {"state": states})
    t.writer.metrics[:] = report.read_lines(folder / "metrics.jsonl")
    _take_over(t.stepper, state["memory"])
    if t.ranks.is_main:
        _best(t.folder).unlink(missing_ok=True)  # it may be from a later step than the snapshot
        if (folder / "best.safetensors").exists():
            _best(t.folder).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / "best.safetensors", _best(t.folder))
    return Progress(**state["progress"])


def _take_over(stepper: Stepper, plans: list[dict[str, Any]]) -> None:
    """Takes over the snapshot's memory plan: other micro-batches would draw other random numbers.

    On a GPU never a larger plan than fits this device, which may differ from the one that the run began on.
    """
    then = plans[min(stepper.ranks.index, len(plans) - 1)]
    plan = replace(stepper.memory, **{name: value for name, value in then.items() if name not in _OF_THIS_HOST})
    if then.get("recompute") is True:  # of a snapshot from before layers were counted
        plan = replace(plan, recompute=stepper.objective.layers)
    if stepper.device.type == "cuda":
        most = min(stepper.memory.max_tokens, plan.max_tokens)
        packed = None if plan.packed_tokens is None else min(most, plan.packed_tokens)
        plan = replace(
            plan,
            max_tokens=most,
            packed_tokens=packed,
            recompute=max(stepper.memory.recompute, plan.recompute),
            offload=stepper.memory.offload or plan.offload,
        )
    # Of a plan that recomputes layers where its own does not, preflight has not judged whether it can be recorded.
    judged = (plan.recompute > 0) == (stepper.memory.recompute > 0)
    stepper.adopt(replace(plan, graphs=plan.graphs and judged))


def _of_format_1(
    names: list[str], state: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Converts a snapshot from format 1, which addressed state by the parameter's index and had rank 0's only."""

    def renamed(key: str) -> str:
        place, _, rest = key.partition(".")
        return f"{names[int(place)]}:{rest}" if place.isdecimal() else key.replace("random.", "random.0.")

    numbers = {renamed(key): value for key, value in state["optimizer"].items()}
    moved = {renamed(key): value for key, value in tensors.items()}
    progress = {"gained_loss": state["progress"]["best_loss"], **state["progress"]}
    memory = [{"max_tokens": state["budget"]}]
    return state | {"optimizer": numbers, "memory": memory, "progress": progress}, moved


def keep_best(t: Training) -> None:
    """Saves the current weights as the best so far, in a new file: snapshots linked to the old one keep theirs."""
    weights = t.ranks.gather_state(t.parameters, _cut(t))
    if t.ranks.is_main:
        _best(t.folder).parent.mkdir(exist_ok=True)
        partial = _best(t.folder).with_suffix(".partial")
        with whole_folders.room_for("the best step's weights", t.folder / "snapshots", partial):
            save_file(weights, partial)
        partial.replace(_best(t.folder))
    t.ranks.wait()


def restore_best(t: Training, progress: Progress) -> None:
    """Loads the best step's weights. Raises RuntimeError if they are missing."""
    if not _best(t.folder).exists():  # why not use the last weights: the record would be wrong
        raise RuntimeError(f"the weights of step {progress.best_step}, the best, are missing from snapshots/")
    _load_weights(t.parameters, _best(t.folder))


def save_public(t: Training, progress: Progress) -> str:
    """Saves a public checkpoint of the current model and drops old ones, but for the best and the newest; returns its
    path.
    """
    path = f"checkpoints/step-{progress.step}"
    weights = whole_weights(t)
    if t.ranks.is_main:
        whole_folders.write_whole(t.folder / path, lambda folder: write_artifact(t, progress, folder, weights))
        whole_folders.drop_old(t.folder / "checkpoints", t.run.public_checkpoints, spared=_best_public(t))
    return path


def whole_weights(t: Training) -> recipe.Weights | None:
    """Returns the whole weights for an artifact if the model is sharded over the ranks, each of which must call this.

    None if the model itself has them: adapters are whole on every rank.
    """
    if t.shards is None or isinstance(t.objective.model, PeftModel):
        return None
    return t.shards.whole_weights()


def write_artifact(t: Training, progress: Progress, folder: Path, weights: recipe.Weights | None = None) -> None:
    """Writes the model in its own format, with its tokenizer, template, configuration and metrics.

    `weights`: from `whole_weights`.
    """
    t.recipe.export(t.objective.model, folder, t.run.base_model, weights)
    files = texts(t.folder)
    for name in (*TOKENIZER_FILES, *template_files.additional_names(files)):
        if (files / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(files / name, folder / name)
    (folder / "generation_config.json").write_text(
        json.dumps(_generation_config(t.folder, t.template.eos_ids), indent=2) + "\n"
    )
    measured = {"precision": asdict(t.precision), "memory": asdict(t.stepper.memory), "paths": paths.describe(t)}
    measured["coverage"] = coverage.of(t)
    measured["hardware"] = hardware.describe(t.device, t.ranks.count)
    measured["rows_sha256"] = {"training": t.rows.sha256} | ({} if t.valid is None else {"validation": t.valid.sha256})
    described = report.describe(
        t.run,
        t.template.sha256,
        **measured,
        scored_in=t.precision.base,
        progress=asdict(progress),
        replay=None if t.replayed is None else t.replayed.model_dump(),
        warnings=list(t.warnings),
    )
    (folder / "training_config.json").write_text(json.dumps(described, indent=2) + "\n")
    report.write_lines(folder / "metrics.jsonl", t.writer.metrics)
    report.write_results(folder / "results.csv", t.writer.metrics)


def texts(folder: Path) -> Path:
    """Returns the folder of a run's tokenizer and chat template: that of an adapter it continues, or the base's.

    An adapter that was trained elsewhere may have a template of its own.
    """
    return folder / "adapter" if (folder / "adapter" / "tokenizer.json").exists() else folder / "base"


def _generation_config(folder: Path, eos_ids: Iterable[int]) -> dict[str, Any]:
    """Returns the base's own generation settings with the stop tokens that were trained, so that `generate` stops
    there.
    """
    own = texts(folder) / "generation_config.json"
    settings: dict[str, Any] = json.loads(own.read_text()) if own.exists() else {}
    settings.pop("_from_model_config", None)  # with it, transformers would use the stop tokens of config.json instead
    return settings | {"eos_token_id": sorted(eos_ids)}


def _best(folder: Path) -> Path:
    return folder / "snapshots" / "best.safetensors"


def _load_weights(parameters: Mapping[str, torch.nn.Parameter], path: Path) -> None:
    weights = _read(path, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _read(path: Path, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Reads a file's tensors by name, `PARAMETER` or `PARAMETER:KEY`; of a piece only its part, whichever ranks wrote
    it.
    """
    found: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            name = key.partition(":")[0]
            piece = pieces.of(parameters[name]) if name in parameters else None
            stored = file.get_slice(key)
            if piece is not None and (key == name or pieces.is_cut(key, stored.get_shape())):
                found[key] = stored[piece.part_of(stored.get_shape()[0])]
            else:
                found[key] = file.get_tensor(key)
    return found


def _cut(t: Training) -> set[str]:
    """Returns the names of the parameters that are pieces of a sharded weight."""
    return {name for name, parameter in t.parameters.items() if pieces.of(parameter) is not None}


def _fits_cut(t: Training, folder: Path, ranks: int) -> bool:
    """Whether a snapshot's 8-bit moments, saved by `ranks` ranks, can be split over the present ones."""
    if ranks == (t.ranks.count if t.shards is not None else 1):
        return True
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        blocked = {key.partition(":")[0] for key in file.keys() if "absmax" in key}  # noqa: SIM118 (no mapping)
    counts = {ranks, t.ranks.count}
    shapes = {name: pieces.whole_shape(parameter) for name, parameter in t.parameters.items() if name in blocked}
    return all(pieces.cut(shape, i, n).at_blocks for shape in shapes.values() for n in counts for i in range(n))


def _names(t: Training) -> list[str]:
    """Returns the names of the optimizer's parameters, in its order."""
    name_of = {id(parameter): name for name, parameter in t.parameters.items()}
    return [name_of[id(parameter)] for group in t.optimizer.param_groups for parameter in group["params"]]


def _by_name(names: list[str], states: dict[int, Any]) -> dict[str, Any]:
    return {names[index]: state for index, state in states.items()}


def _by_index(names: list[str], states: dict[str, Any]) -> dict[int, Any]:
    return {index: states[name] for index, name in enumerate(names) if name in states}


def _flatten(states: dict[Any, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Flattens an optimizer's nested state to numbers and tensors by `parameter:key` (or `parameter:key:key`)."""
    numbers: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, value in states.items():
        if isinstance(value, dict):
            inner_numbers, inner_tensors = _flatten(value, f"{prefix}{key}:")
            numbers |= inner_numbers
            tensors |= inner_tensors
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
        else:
            numbers[f"{prefix}{key}"] = value
    return numbers, tensors


def _unflatten(numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    states: dict[str, dict[str, Any]] = {}
    for name, value in {**numbers, **tensors}.items():
        parameter, *keys = name.split(":")
        if keys:
            place = states.setdefault(parameter, {})
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = value
    return states


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Restores the rank's random state; a rank that the snapshot lacks keeps its own."""
    if f"{prefix}cpu" in tensors:
        torch.set_rng_state(tensors[f"{prefix}cpu"])
    if torch.cuda.is_available() and f"{prefix}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{prefix}cuda"])


def _best_public(t: Training) -> int | None:
    """Returns the step of the best kept checkpoint by the validation file; None if none was evaluated."""
    losses = {
        entry["step"]: -entry["task_score"] if t.chooses_by_task else entry["loss"]
        for entry in t.writer.metrics
        if entry["type"] == "evaluated" and (t.folder / "checkpoints" / f"step-{entry['step']}").exists()
    }
    return min(losses, key=lambda step: (losses[step], step), default=None)
