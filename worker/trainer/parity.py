"""Checks that the exported files answer as the model did in memory, and writes `parity.json`.

Before the model is written, the logits after the last token of a few prompts are computed in memory: its weights in the
artifact's type, its base as in the run (in four bits for QLoRA), the products in fp32. The files, loaded by plain
transformers and PEFT, must give the same logits, or the run fails. Anyone who has the files can repeat the check.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tunery.failures import ArtifactDiffers
from tunery.planning.peak import CHECKED_BYTES, MOST_CHECKED, MOST_PROMPT
from tunery.spec import Full
from worker.trainer import dtypes, precision, rope
from worker.trainer.data import Rows
from worker.trainer.hardware import free_bytes
from worker.trainer.objective import all_and_trainable
from worker.trainer.recipes import saved
from worker.trainer.recipes.qlora import keep_one_packing, quantisation
from worker.trainer.training import Training

log = logging.getLogger(__name__)

PROMPTS = 3
TOLERANCE, QUANTISED_TOLERANCE, NARROW_TOLERANCE = 1e-3, 1e-2, 5e-2
"""The most by which the files' logits may differ, relative to the spread of a prompt's logits. The same fp32 products
in another order differ by 1e-6; on some CPUs bitsandbytes rounds the scales of four-bit weights further (0.3 %);
products in bf16 differ by about 1 %.
"""


@dataclass(frozen=True)
class Record:
    """The content of `parity.json`. `dtype`: that of the products. `base`, `quantisation`: how the base was kept.

    `difference`: that of the files' logits; None if a large model was not loaded a second time.
    """

    dtype: str
    device: str
    base: str
    quantisation: dict[str, Any] | None
    position: str
    tolerance: float
    difference: float | None
    prompts: list[dict[str, Any]]


def bytes_to_read(t: Training) -> int:
    """Returns the bytes of the model that the check loads; 0 for a large model, which it does not load."""
    params, _ = all_and_trainable(t.objective.model)
    return CHECKED_BYTES * params if params <= MOST_CHECKED else 0


def measure(t: Training) -> Record:
    """Returns the logits of the model in memory; call it before the export."""
    if t.shards is None and _has_room(t.objective.model, t.device):
        try:
            return _measure(t, exact=True)
        except torch.OutOfMemoryError:
            log.info("no room for the weights in fp32")
    return _measure(t, exact=False)


def write(t: Training, record: Record, artifact: Path) -> None:
    """Writes `parity.json` to `artifact`. Raises ArtifactDiffers if its files do not answer as `record` says."""
    difference = _try_difference(t, record, artifact)
    if difference is not None and not difference <= record.tolerance:  # a NaN too
        raise ArtifactDiffers(difference=difference, tolerance=record.tolerance)
    (artifact / "parity.json").write_text(json.dumps(asdict(replace(record, difference=difference))) + "\n")


def _has_room(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether the model is small, and there is room for an fp32 copy."""
    params, _ = all_and_trainable(model)
    room = free_bytes(device) if device.type == "cuda" else psutil.virtual_memory().available
    return params <= MOST_CHECKED and room >= CHECKED_BYTES * params


def _measure(t: Training, exact: bool) -> Record:
    quantised, prompts = t.precision.quantised, _prompts(t.rows if t.valid is None else t.valid)
    config = quantisation(t.precision) if quantised else None
    compute = "float32" if exact else t.precision.compute
    if config is not None:
        config["bnb_4bit_compute_dtype"] = compute
    wide_tolerance = QUANTISED_TOLERANCE if quantised else TOLERANCE
    return Record(
        dtype=compute,
        device=t.device.type,
        base=t.precision.base,
        quantisation=config,
        position="last",
        tolerance=wide_tolerance if exact else NARROW_TOLERANCE,
        difference=None,
        prompts=[
            {"input_ids": ids, "logits": [float(f"{logit:.7g}") for logit in logits.tolist()]}
            for ids, logits in zip(prompts, _in_memory(t, prompts, exact), strict=True)
        ],
    )


def _in_memory(t: Training, prompts: list[list[int]], exact: bool) -> list[Tensor]:
    """Returns the logits [vocabulary] after each prompt."""
    model: Any = t.objective.model
    keep = dtypes.keeps(t.objective.causal)
    # No file has RoPE's frequencies. For a sharded model, this call would release what was gathered.
    written = set(model.state_dict()) if exact else set[str]()

    def exported(name: str, weight: Tensor) -> Tensor:
        if saved.learns_whole(name):
            return weight.to(precision.dtype(t.precision.dense))
        narrowed = isinstance(t.plan.technique, Full) and name in written
        return dtypes.to_bf16(name, weight, keep) if narrowed else weight

    t.objective.eval()
    with precision.in_fp32(model, exported) if exact else t.objective.computing():
        found = _logits(model, prompts)
    t.objective.train()
    return found


def _try_difference(t: Training, record: Record, artifact: Path) -> float | None:
    """Returns the files' difference if there is room to load the model again, else None."""
    if record.tolerance < NARROW_TOLERANCE and _has_room(t.objective.model, t.device):
        try:
            return _difference(t, record, artifact)
        except torch.OutOfMemoryError:
            pass
    log.info("the exported files are not loaded for a check: the model is large, or memory is short")
    return None


def _difference(t: Training, record: Record, artifact: Path) -> float:
    """Returns the largest difference of a prompt's logits, relative to their spread."""
    model = _load(t, record, artifact)
    rope.install(model)  # each prompt is compared alone, not with frequencies of a longer one before it
    with precision.in_fp32(model, lambda _name, weight: weight):
        found = _logits(model, [prompt["input_ids"] for prompt in record.prompts])
    wanted = [torch.tensor(prompt["logits"]) for prompt in record.prompts]
    return max(float((a - b).norm() / (b - b.mean()).norm()) for a, b in zip(found, wanted, strict=True))


def _load(t: Training, record: Record, artifact: Path) -> Any:
    """Loads the files as a user would: an adapter on the base in the type in which the run read it."""
    options: dict[str, Any] = {"device_map": {"": t.device}}
    if isinstance(t.plan.technique, Full):
        return AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, **options).eval()
    if record.quantisation is not None:
        options["quantization_config"] = BitsAndBytesConfig(**record.quantisation)
    base = AutoModelForCausalLM.from_pretrained(t.folder / "base", dtype=precision.dtype(t.precision.dense), **options)
    keep_one_packing(base)
    return PeftModel.from_pretrained(base, str(artifact)).eval()


@torch.no_grad()
def _logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu() for ids in prompts]


def _prompts(rows: Rows) -> list[list[int]]:
    """Returns the first rows up to their first trained token."""
    prompts = []
    for row in rows.rows[:PROMPTS]:
        first = next(place for place, label in enumerate(row.labels) if label >= 0)
        prompts.append(row.input_ids[: max(2, first)][-MOST_PROMPT:])
    return prompts
