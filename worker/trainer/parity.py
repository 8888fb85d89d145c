"""`parity.json`: what the exported files, loaded as a user loads them, answer to three prompts.

Whoever downloads the artifact can repeat it: load it with plain transformers and peft in fp32 on a CPU, run the token
ids and compare the logits after the last one.
"""

import json
import logging
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from worker.trainer.objective import all_and_trainable
from worker.trainer.training import Training

log = logging.getLogger(__name__)

PROMPTS = 3
_BYTES_A_PARAM = 6
"""fp32 weights, and the bf16 file that they are read from."""
MOST_PARAMS = 2_000_000_000
"""Larger bases take minutes and tens of GB to load in fp32, more than the check is worth at every run's end."""


def write(t: Training, artifact: Path) -> None:
    """Writes `parity.json` into `artifact`, from its files; not for a large base, nor where the host has no room."""
    params, _ = all_and_trainable(t.objective.model)
    if params > MOST_PARAMS or psutil.virtual_memory().available < _BYTES_A_PARAM * params:
        log.info("no parity.json: the base is too large to load a second time in fp32 here")
        return
    model = _load(t.folder / "base", artifact)
    with torch.no_grad():
        entries = [
            {"input_ids": ids, "logits": _rounded(model(torch.tensor([ids])).logits[0, -1])} for ids in _prompts(t)
        ]
    record = {"dtype": "float32", "device": "cpu", "position": "last", "prompts": entries}
    (artifact / "parity.json").write_text(json.dumps(record) + "\n")


def _load(base: Path, artifact: Path) -> Any:
    adapted = (artifact / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(base if adapted else artifact, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(artifact)).eval() if adapted else model.eval()


def _prompts(t: Training) -> list[list[int]]:
    """The first rows up to their first trained token: prompts as the model was trained on."""
    prompts = []
    for row in t.rows.rows[:PROMPTS]:
        first = next(place for place, label in enumerate(row.labels) if label >= 0)
        prompts.append(row.input_ids[: max(1, first)][-512:])
    return prompts


def _rounded(logits: torch.Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in logits.tolist()]
