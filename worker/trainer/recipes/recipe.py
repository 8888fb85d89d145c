"""What differs between techniques: four functions. Everything else is the same loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tunery.spec import Plan, Technique


@dataclass(frozen=True)
class Recipe:
    """How one technique loads the base, chooses what learns, optimises it and writes it down.

    `load_base(folder, technique, device)` gives the frozen or trainable base on the device.
    `prepare(model, technique, adapter)` marks what learns; `adapter`: the folder of one to go on from, or None.
    `make_optimizer(parameters, plan)` takes the parameters that learn.
    `export(model, folder, base_model)` writes the files that a user loads; `base_model` is the registered name.
    """

    load_base: Callable[[Path, Technique, torch.device], PreTrainedModel]
    prepare: Callable[[PreTrainedModel, Technique, Path | None], torch.nn.Module]
    make_optimizer: Callable[[list[torch.nn.Parameter], Plan], torch.optim.Optimizer]
    export: Callable[[torch.nn.Module, Path, str], None]


def load_dense(folder: Path, _technique: Technique, device: torch.device) -> PreTrainedModel:
    """The base in bf16 on a GPU and in fp32 on a CPU, where bf16 products are slow and less exact."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    return model


def groups(parameters: list[torch.nn.Parameter], plan: Plan) -> list[dict[str, object]]:
    """Optimizer groups: weight decay pulls on matrices, never on norms and biases."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    both = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]
