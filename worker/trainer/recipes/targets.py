"""Finds what adapters on all of a model's linear weights must name, and which of its parts take none."""

import copy
import re
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, also in four bits."""
    return isinstance(module, nn.Linear | Conv1D)


def routers(model: nn.Module) -> list[str]:
    """Returns the names of linear layers with their own forward, such as Llama 4's and Phi-MoE's routers.

    PEFT treats them as plain products that return one tensor.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).__module__.startswith("transformers.models.")
        and type(module).forward is not nn.Linear.forward
    ]


def idle(model: Any) -> list[str]:
    """Returns the names of linear layers outside the decoder, which text does not pass through: those of a vision
    tower.
    """
    inside = {id(module) for module in model.get_decoder().modules()} | {id(model.get_output_embeddings())}
    return [name for name, module in model.named_modules() if is_linear(module) and id(module) not in inside]


def experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the experts' weights by name, [experts, in, out] or [experts, out, in], held by no linear module."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if "Experts" in type(module).__name__
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def parameters(model: Any, config: LoraConfig) -> list[str]:
    """Returns suffixes of the names of weights that PEFT's "all-linear" omits, for its `target_parameters`.

    For models whose experts PEFT knows, it replaces "all-linear" with names, and mistakes a dense block's `gate_proj`
    for the experts'. It does not know other models' experts at all.
    """
    known = copy.deepcopy(config)
    convert_peft_config_for_transformers(known, model, None)
    found = {name for name in experts(model) if not _ends(name, known.target_parameters or ())}
    if isinstance(known.target_modules, set):
        skipped = {*routers(model), *idle(model)}
        found |= {
            f"{name}.weight"
            for name, module in model.get_decoder().named_modules()
            if is_linear(module) and name not in skipped and not _ends(name, known.target_modules)
        }
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in found})


def _ends(name: str, ends: Any) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
