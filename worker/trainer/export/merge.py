"""Merges an adapter into its base: writes a whole model's files, and `merge.json`, which shows that they answer alike.

Every product is added to its weight in fp32 and rounded to bf16 once. The predictions of the files, read back by plain
transformers, are compared with those of the adapter on the very base that it was merged into. An adapter that was
trained on a base in four bits is merged twice, into the original base and into the dequantised one; the merge that
predicts more like the trained model is kept, with the figures of both.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import psutil
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tunery.planning.precision import Precision
from worker.trainer import dtypes, precision, report
from worker.trainer.data import Row
from worker.trainer.export import files, proof
from worker.trainer.export.errors import MergeDiffers, NoRoom
from worker.trainer.export.proof import Divergence
from worker.trainer.kernels import stochastic
from worker.trainer.recipes.full import FULL
from worker.trainer.recipes.qlora import load_quantised

RECORD = "merge.json"
Weights = dict[str, Tensor]
Rounding = Literal["nearest", "stochastic"]
"""The base's own weights are exact in bf16. Of an update smaller than half a step, rounding to nearest leaves nothing
in any weight; with random rounding, the sum over a row is right on average.
"""


@dataclass(frozen=True)
class Source:
    """What is merged: the folders of base and adapter, and the precision in which the adapter was trained."""

    base: Path
    adapter: Path
    precision: Precision
    device: torch.device


@dataclass(frozen=True)
class Candidate:
    """A merge into one base. `proof`: its divergence from the adapter on that base. `trained`: from the adapter as
    trained.
    """

    base: str
    rounding: Rounding
    folder: Path
    proof: Divergence
    trained: Divergence

    def describe(self) -> dict[str, Any]:
        measured = {"proof": asdict(self.proof), "from_trained": asdict(self.trained)}
        return {"base": self.base, "rounding": self.rounding, **measured}


def write(source: Source, rows: Iterable[Row], out: Path) -> dict[str, Any]:
    """Writes the merged model to `out`, which must not exist; returns its record. Raises ExportRefused."""
    source = _with_room(source)
    config = AutoConfig.from_pretrained(source.base).get_text_config()
    chosen = proof.choose(rows, config.vocab_size)
    with files.temporary_folder(out) as folder:
        candidates = _candidates(source, chosen, folder)
        best = min(candidates, key=lambda candidate: candidate.trained.order)
        best.proof.check(proof.EQUAL, MergeDiffers)
        record = _describe(source, best, candidates)
        (best.folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        files.copy_texts(source.adapter, best.folder)
        best.folder.rename(out)
    return record


def summary(record: dict[str, Any]) -> str:
    """Returns the record's figures as a sentence."""
    kept = (record["merged_into"], record["rounding"])
    [best] = [each for each in record["candidates"] if (each["base"], each["rounding"]) == kept]
    return f"Merged into the {best['base']} base: {Divergence(**best['proof']).describe('the adapter on it')}"


def _describe(source: Source, best: Candidate, candidates: list[Candidate]) -> dict[str, Any]:
    return {
        "merged_into": best.base,
        "rounding": best.rounding,
        "bounds": asdict(proof.EQUAL),
        "candidates": [candidate.describe() for candidate in candidates],
        "base_weights_sha256": files.weights_sha256(source.base),
        "versions": report.versions(),
    }


def _candidates(source: Source, rows: list[Row], folder: Path) -> list[Candidate]:
    trained, unpacked = _quantised(source, rows) if source.precision.quantised else (None, None)
    bases: dict[str, Weights | None] = {"original": None}
    if unpacked is not None:
        bases["dequantised"] = unpacked
    found: list[Candidate] = []
    for base, weights in bases.items():
        found.append(_candidate(source, rows, folder, base, weights, trained))
        if not found[-1].proof.keeps(proof.EQUAL):
            found.append(_candidate(source, rows, folder, base, weights, trained, "stochastic"))
    return found


def _candidate(
    source: Source,
    rows: list[Row],
    folder: Path,
    base: str,
    weights: Weights | None,
    trained: Tensor | None,
    rounding: Rounding = "nearest",
) -> Candidate:
    """Merges into the original weights, or into `weights`. `trained`: the predictions of the model as trained."""
    model = _adapted(source, weights)
    reference = proof.log_probs(model, rows)
    out = folder / f"{base}-{rounding}"
    _write_merged(model, out, rounding)
    del model
    files.free_memory()
    found = proof.log_probs(_load(out, source.device), rows)
    files.free_memory()
    divergence = proof.compare(reference, found)
    from_trained = divergence if trained is None else proof.compare(trained, found)
    return Candidate(base, rounding, out, divergence, from_trained)


def _quantised(source: Source, rows: list[Row]) -> tuple[Tensor, Weights]:
    """Returns the predictions of the adapter on the base in four bits, and that base's dequantised weights."""
    base = load_quantised(source.base, source.precision, source.device)
    unpacked = {
        f"{name}.weight": _unpack(layer.weight)
        for name, layer in base.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }
    model = PeftModel.from_pretrained(base, str(source.adapter)).eval()
    with precision.in_fp32(model, lambda _name, weight: weight):
        trained = proof.log_probs(model, rows)
    del base, model
    files.free_memory()
    return trained, unpacked


def _unpack(weight: Any) -> Tensor:
    unpacked: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return unpacked.cpu()


def _with_room(source: Source) -> Source:
    """Returns the source on its device, or on the CPU if only that has room for the base in fp32. Raises NoRoom."""
    needed = 4 * files.parameters(source.base)
    devices = dict.fromkeys((source.device, torch.device("cpu")))
    free = {device: _free(device) for device in devices}
    for device, available in free.items():
        if needed <= available:
            return replace(source, device=device)
    raise NoRoom(needed=f"{needed / 1e9:.1f} GB", available=f"{max(free.values()) / 1e9:.1f} GB")


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _load(folder: Path, device: torch.device) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device}).eval()


def _adapted(source: Source, weights: Weights | None) -> PeftModel:
    base = _load(source.base, source.device)
    for name, weight in (weights or {}).items():
        base.get_parameter(name).data.copy_(weight)
    return PeftModel.from_pretrained(base, str(source.adapter)).eval()


def _write_merged(model: Any, out: Path, rounding: Rounding) -> None:
    """Merges in place by PEFT's own rule for each kind of layer, and writes the whole model."""
    _untie(model.get_base_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        merged = model.merge_and_unload()
    if rounding == "stochastic":
        _round(merged)
    out.mkdir()
    FULL.export(merged, out, "", None)


@torch.no_grad()
def _round(model: Any) -> None:
    """Rounds the weights that become bf16 up or down at random, each tensor with its own seed."""
    keep = dtypes.keeps(model)
    for name, weight in model.named_parameters():
        if not keep(name):
            seed = stochastic.seed_of(0, 0, name)
            noise = stochastic.noise(seed, 0, weight.numel(), weight.device)
            weight.copy_(stochastic.rounded(weight.float().flatten(), noise).view_as(weight))


def _untie(model: Any) -> None:
    """Gives the head its own weight if an adapter on one of two tied layers makes them differ."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if _are_tied(model) and (isinstance(head, BaseTunerLayer) or isinstance(embeddings, BaseTunerLayer)):
        layer: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _are_tied(model: Any) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight.data_ptr() == embeddings.weight.data_ptr()
