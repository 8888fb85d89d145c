"""Reports which of a model's linear weights learn or are in four bits, by kind of module, and why others are not.

Embeddings and the head are left out: only the full fine-tune changes them.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM

from tunery.failures import CannotAdapt
from tunery.spec import Full, Lora, Technique
from worker.trainer.kernels import experts as kernels
from worker.trainer.recipes import lora, targets
from worker.trainer.training import Training

LEAST = 0.9
"""Fraction of the weights below which a run warns."""
_IDLE = "text never passes it"


@dataclass(frozen=True)
class Weight:
    """One linear weight: its name without layer numbers, and its number of parameters."""

    kind: str
    count: int
    learns: bool
    quantised: bool
    why: str | None


def describe(model: nn.Module, technique: Technique, *, quantised: bool) -> dict[str, Any]:
    """Returns the report: fractions of linear weights that learn and that are `quantised` (None if none should be).

    `kinds` counts both by kind of module. Modules that text does not pass through are listed, but not counted.
    """
    weights = list(_weights(model, technique))
    used = [weight for weight in weights if weight.why != _IDLE]
    total = max(1, sum(weight.count for weight in used))
    return {
        "learning": sum(weight.count for weight in used if weight.learns) / total,
        "quantised": sum(weight.count for weight in used if weight.quantised) / total if quantised else None,
        "kinds": [_sum([each for each in weights if each.kind == kind]) for kind in sorted({w.kind for w in weights})],
    }


def model_info(config: Any) -> dict[str, Any]:
    """What the memory estimate needs to know of a model: `counts` of weights, and how wide the experts of a token are.

    `counts` is what `planning.shape.Shape` says; nothing of a model whose layers cannot all be adapted.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    linear = dict(_linear(model))
    experts = targets.experts(model)
    counts = {
        "four_bit": sum(weight.numel() for name, weight in linear.items() if name not in experts),
        "experts": sum(weight.numel() for weight in experts.values()),
    }
    with suppress(CannotAdapt):
        adapted = lora.with_new_adapters(model, lora.configuration(model, Lora(r=1)))
        counts["rank_1"] = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        counts["unmerged"] = kernels.weights_taken(adapted)
    return {"counts": counts, "active_experts_size": _active_size(config.get_text_config())}


def _active_size(text: Any) -> int:
    """Returns the total width of the experts that a token passes through, including shared ones."""
    size = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 0
    chosen = getattr(text, "num_experts_per_tok", None) or 0
    return int(size) * (int(chosen) + (getattr(text, "n_shared_experts", None) or 0))


def of(t: Training) -> dict[str, Any]:
    """Returns a run's report."""
    return describe(t.objective.model, t.plan.technique, quantised=t.precision.quantised)


def warnings(report: dict[str, Any]) -> list[str]:
    """Returns a sentence for each fraction below LEAST, which names the largest kinds left out."""
    words = {"learning": "have adapters or are trained themselves", "quantised": "are in four bits"}
    return [
        f"Only {report[key]:.0%} of the base's linear weights {said}. Not included: {_left_out(report, key)}."
        for key, said in words.items()
        if report[key] is not None and report[key] < LEAST
    ]


def _left_out(report: dict[str, Any], key: str) -> str:
    missing = [kind for kind in report["kinds"] if kind[key] < kind["weights"] and kind.get("why") != _IDLE]
    missing.sort(key=lambda kind: kind[key] - kind["weights"])
    named = [f"{kind['kind']} ({kind['why']})" if kind.get("why") else str(kind["kind"]) for kind in missing[:4]]
    return ", ".join(named) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")


def _sum(weights: list[Weight]) -> dict[str, Any]:
    found = {
        "kind": weights[0].kind,
        "weights": sum(weight.count for weight in weights),
        "learning": sum(weight.count for weight in weights if weight.learns),
        "quantised": sum(weight.count for weight in weights if weight.quantised),
    }
    why = next((weight.why for weight in weights if weight.why), None)
    return found | ({"why": why} if why else {})


def _weights(model: nn.Module, technique: Technique) -> Iterator[Weight]:
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    idle, routers, adapted = set(targets.idle(causal)), set(targets.routers(causal)), _adapted(causal)
    for name, parameter in _linear(causal):
        module = name.rpartition(".")[0]
        learns = id(parameter) in adapted or parameter.requires_grad
        state = getattr(parameter, "quant_state", None)
        why = _IDLE if module in idle else None if learns else _why(module in routers, technique)
        count = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        yield Weight(_kind(name), count, learns, state is not None, why)


def _linear(causal: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the weights of linear layers and experts by name, without the head and adapters."""
    head = causal.get_output_embeddings()
    for name, module in causal.named_modules():
        if targets.is_linear(module) and module is not head and ".lora_" not in name:
            yield f"{name}.weight", module.weight
    yield from targets.experts(causal).items()


def _adapted(model: nn.Module) -> set[int]:
    """Returns the ids of the weights that have an adapter."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {id(_base_weight(layer)) for layer in layers}


def _base_weight(layer: Any) -> Any:
    is_wrapper: bool = isinstance(layer, ParamWrapper)
    return layer.get_param() if is_wrapper else layer.get_base_layer().weight


def _why(is_router: bool, technique: Technique) -> str:
    assert not isinstance(technique, Full)
    if isinstance(technique, Lora) and technique.target_modules != "all-linear":
        return "not among target_modules"
    return "a router with a forward of its own" if is_router else "PEFT adapts no module of its kind"


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.replace(".base_layer", "").removesuffix(".weight"))
