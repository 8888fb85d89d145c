"""Describes which code path each part of a run took, and why if not the fast one, for the log and the record."""

import inspect
from collections import Counter
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from tunery.spec import Plan
from worker.trainer import cuda_graphs
from worker.trainer.kernels import experts
from worker.trainer.memory import MemoryPlan
from worker.trainer.scoring import answers
from worker.trainer.training import Training

_KERNELS = "worker.trainer.kernels."
_KINDS = ("DecoderLayer", "Block", "MLP", "Norm")
"""Suffixes of the names of classes for which there may be a kernel."""


def describe(t: Training) -> dict[str, Any]:
    """Returns the paths of modules by kind, loss and attention; of packing, recomputation, CUDA graphs and ranks."""
    return {
        "modules": _modules(t.objective.model),
        "frozen products": _frozen_products(t),
        **_experts(t.objective.model),
        "loss": _path("chunked", None if t.objective.chunked else "the logits are more than one product of the head"),
        "attention": str(getattr(t.objective.causal.config.get_text_config(), "_attn_implementation", "unknown")),
        "rows": "behind each other, with their borders" if t.objective.knows_borders else "padded",
        "packing": _path("packed", _against_packing(t.stepper.memory, t.plan)),
        "recompute": t.stepper.memory.recompute,
        "graphs": _path("recorded", _against_graphs(t)),
        "answers": _path("decoder", answers.against_decoder(t)),
        "ranks": t.ranks.count,
        "sharding": "replicate" if t.shards is None else "full_shard",
    }


def _frozen_products(t: Training) -> dict[str, Any]:
    return {"path": t.precision.compute} if t.eight_bits is None else t.eight_bits.describe()


def _experts(model: nn.Module) -> dict[str, Any]:
    """Returns how adapted experts' products are computed; nothing of a model without any."""
    found = experts.products(model)
    return {} if found is None else {"experts": found}


def _path(name: str, against: str | None) -> dict[str, str]:
    return {"path": name} if against is None else {"path": "plain", "why": against}


def _modules(model: nn.Module) -> list[dict[str, Any]]:
    """Returns the modules that have or could have a kernel, by class and path."""
    found = Counter(
        (_class(module), *_module_path(module))
        for module in model.modules()
        if isinstance(module, LoraLayer) or _kernel(module) or type(module).__name__.endswith(_KINDS)
    )
    return [
        {"kind": kind, "count": count, "path": path} | ({"why": why} if why else {})
        for (kind, path, why), count in sorted(found.items())
    ]


def _class(module: nn.Module) -> str:
    """Returns a module's class; for a LoRA layer, with `lora.` before PEFT's name."""
    return f"lora.{type(module).__name__}" if isinstance(module, LoraLayer) else type(module).__name__


def _kernel(module: nn.Module) -> str | None:
    """Returns the kernel that replaced a module's forward."""
    forward = vars(module).get("forward")
    function = None if forward is None else getattr(inspect.unwrap(forward), "__func__", None)
    place = getattr(function, "__module__", "")
    return place.removeprefix(_KERNELS) if place.startswith(_KERNELS) else None


def _module_path(module: nn.Module) -> tuple[str, str]:
    """Returns a module's path, and why it is not a kernel's."""
    kernel = _kernel(module)
    if not isinstance(module, LoraLayer):
        return (kernel, "") if kernel else ("plain", "there is no kernel for this class")
    if kernel is None:
        return "plain", "a kind of adapter without a kernel"
    drops = any(isinstance(dropout, nn.Dropout) for dropout in module.lora_dropout.values())
    return (f"{kernel}, update apart", "dropout on the adapter's input") if drops else (kernel, "")


def _against_packing(memory: MemoryPlan, plan: Plan) -> str | None:
    if memory.packed_tokens is not None:
        return None
    return "packed rows see each other in this model" if plan.packing else "not asked for"


def _against_graphs(t: Training) -> str | None:
    graphs = t.stepper.graphs
    if graphs is not None:
        return "this model cannot be recorded" if graphs.failed else None
    tokens = min(t.stepper.memory.max_tokens, round(t.rows.tokens_a_step(t.plan.batch_size, t.ranks.count)))
    return cuda_graphs.reason_against(t.objective, tokens, t.ranks.count) or "their memory was needed"
