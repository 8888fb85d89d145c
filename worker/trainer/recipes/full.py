"""Full fine-tuning: every weight learns."""

import json
from pathlib import Path
from typing import cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from tunery.planning.precision import Precision, decide
from tunery.spec import Plan, Technique
from worker.trainer import dtypes
from worker.trainer.adamw import StochasticAdamW
from worker.trainer.kernels import decoder
from worker.trainer.recipes.recipe import Parameters, Recipe, Weights, groups, load_dense, make_adamw


def prepare(model: PreTrainedModel, technique: Technique, adapter: Path | None) -> torch.nn.Module:
    if adapter is not None:
        raise ValueError(
            "a full fine-tune cannot continue from an adapter: use technique 'lora' or 'qlora', or a full model as base"
        )
    model.requires_grad_(True)
    # A model that will be sharded over the GPUs is in host memory here.
    device = "cuda" if torch.cuda.is_available() else model.device.type
    if not decide(technique, device).autocast:  # the fused layers need one type for weights and activations
        decoder.install(model)
    return model


def make_optimizer(parameters: Parameters, plan: Plan, precision: Precision) -> torch.optim.Optimizer:
    """Returns AdamW; for bf16 weights with 8-bit moments and stochastic rounding."""
    if precision.rounding == "nearest":
        return make_adamw(parameters, plan, precision)
    return StochasticAdamW(groups(parameters, plan), plan.learning_rate, plan.seed)


SHARD = "5GB"
"""Largest file of a model: hubs, and tools that read one file at a time into memory, do not take much larger ones."""


def export(model: torch.nn.Module, folder: Path, _base_model: str, weights: Weights | None = None) -> None:
    """Writes `model.safetensors` in bf16 with its config. The base's name is in training_config.json."""
    tuned = cast(PreTrainedModel, model)
    keep = dtypes.keeps(tuned)
    # One cast for each tensor, not for each name: a tied head would become a copy, and be saved separately.
    cast_of: dict[int, torch.Tensor] = {}
    narrowed = {
        name: cast_of.setdefault(tensor.data_ptr(), dtypes.to_bf16(name, tensor, keep))
        for name, tensor in (tuned.state_dict() if weights is None else weights).items()
    }
    # The base's settings may be inconsistent (a temperature without sampling), which is an error only when saving.
    settings, tuned.generation_config = tuned.generation_config, GenerationConfig()
    tuned.save_pretrained(str(folder), state_dict=narrowed, safe_serialization=True, max_shard_size=SHARD)
    tuned.generation_config = settings
    config = folder / "config.json"  # it names the type of training, which differs on a CPU
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}, indent=2) + "\n")


FULL = Recipe(load_base=load_dense, prepare=prepare, make_optimizer=make_optimizer, export=export)
