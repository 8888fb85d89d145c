"""The four functions in which techniques differ. Everything else is the same loop."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tunery.planning.precision import Precision
from tunery.spec import Full, Plan, Technique
from worker.trainer.precision import dtype
from worker.trainer.recipes import saved
from worker.trainer.recipes.optimizers import AdamW8bit

Parameters = dict[str, torch.nn.Parameter]
Weights = dict[str, torch.Tensor]
"""A model's weights, by their names in its `state_dict`."""
_EMBEDDING = re.compile(r"embed|\bwte\b|trainable_tokens")
"""Matches the names of weights that are looked up by token."""


@dataclass(frozen=True)
class Recipe:
    """How a technique loads the base, chooses the trained weights, optimises and exports them.

    `load_base(folder, precision, device)` gives the frozen or trainable base on the device.
    `prepare(model, technique, adapter)` marks the trained weights; `adapter`: the folder of one to continue, or None.
    `make_optimizer(parameters, plan, precision)` takes the trained parameters, by name.
    `export(model, folder, base_model, weights)` writes the files that a user loads; `base_model` is the registered
    name, `weights` the model's where it is in pieces itself.
    """

    load_base: Callable[[Path, Precision, torch.device], PreTrainedModel]
    prepare: Callable[[PreTrainedModel, Technique, Path | None], torch.nn.Module]
    make_optimizer: Callable[[Parameters, Plan, Precision], torch.optim.Optimizer]
    export: Callable[[torch.nn.Module, Path, str, Weights | None], None]


def load_dense(folder: Path, precision: Precision, device: torch.device) -> PreTrainedModel:
    """Loads the base with every weight in `precision.base`, except those that transformers keeps in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype(precision.base), device_map={"": device}, trust_remote_code=False
    )
    assert isinstance(model, PreTrainedModel)
    return model


def make_adamw(parameters: Parameters, plan: Plan, _precision: Precision) -> torch.optim.Optimizer:
    """Returns AdamW for fp32 weights, with moments of 32 or 8 bits."""
    if plan.optimizer != "adamw":
        # A CPU has no other memory to move to: the numbers are the same without paging.
        on_gpu = all(parameter.is_cuda for parameter in parameters.values())
        paged = plan.optimizer == "paged_adamw_8bit" and on_gpu
        return AdamW8bit(groups(parameters, plan), plan.learning_rate, paged=paged)
    return torch.optim.AdamW(groups(parameters, plan), lr=plan.learning_rate, fused=True)


def groups(parameters: Parameters, plan: Plan) -> list[dict[str, object]]:
    """Returns optimizer groups of named parameters: weight decay applies to matrices, not to norms and biases.

    `rate_factor` multiplies a group's learning rate: LoRA+'s ratio for the matrices B, and a tenth, as in a full
    fine-tune, for weights trained whole beside adapters. `wide_moments`: embeddings, whose rare tokens have gradients
    far above the others', never have 8-bit moments.
    """
    ratio = 1.0 if isinstance(plan.technique, Full) else plan.technique.lora_plus_ratio
    kinds: dict[tuple[float, float, bool], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        decay = plan.weight_decay if parameter.dim() > 1 else 0.0
        factor = ratio if ".lora_B." in name else 0.1 if saved.learns_whole(name) else 1.0
        kinds.setdefault((decay, factor, bool(_EMBEDDING.search(name))), []).append((name, parameter))
    return [
        {"params": members, "weight_decay": decay, "rate_factor": factor, "wide_moments": wide}
        for (decay, factor, wide), members in kinds.items()
    ]
