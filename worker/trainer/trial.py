"""Finds the techniques that a base supports, by training a small copy of its architecture for one step.

The copy has the base's classes, flags and kinds of layer, random weights, and is loaded, adapted and run by the
trainer's own code. That is enough: whether attention, adapters and four bits work on a model depends on its classes
and flags, not on how many layers, experts and tokens it has, or how wide it is. It needs a few megabytes, so that a
large base can be tried without a GPU.
"""

import logging
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tunery.failures import CannotAdapt, CannotQuantise
from tunery.planning.precision import decide
from tunery.spec import Full, Lora, Qlora, Technique
from worker.trainer import experts
from worker.trainer.data import Row, collate, singles
from worker.trainer.loading import RECIPES
from worker.trainer.objective import Objective
from worker.trainer.recipes.recipe import load_dense

log = logging.getLogger(__name__)

TECHNIQUES: dict[str, Technique] = {"lora": Lora(r=2), "qlora": Qlora(r=2, compute_dtype="float32"), "full": Full()}
OPTIONS = {"dropout": Lora(r=2, dropout=0.1), "dora": Lora(r=2, use_dora=True)}
"""Options that adapters on all layers of some bases do not support."""
MOST_LAYERS, MOST_TOKENS, LEAST_WIDTH = 8, 512, 256
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BYTES_A_PARAM = 16
"""Two copies of fp32 weights, and their gradients."""
_ROUNDING = 1e-2
"""The relative difference of logits in fp32 that the shape of a batch can make; four-bit products make the largest."""


def model_info(model: Any) -> dict[str, Any]:
    """Returns `techniques`: for each its reason why not, or None; each of OPTIONS: why adapters can have none.

    `model` is the base, with weights on no device.
    """
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        if not _save_small_copy(model, Path(folder)):
            return {"techniques": dict.fromkeys(TECHNIQUES), **dict.fromkeys(OPTIONS)}  # nothing speaks against it
        reasons = {name: _reason(Path(folder), technique) for name, technique in TECHNIQUES.items()}
        options = {name: None if reasons["lora"] else _reason(Path(folder), each) for name, each in OPTIONS.items()}
        return {"techniques": reasons, **options}


def _save_small_copy(model: Any, folder: Path) -> bool:
    """Writes the smallest copy that loads and runs without adapters; returns False if there is none."""
    for narrow in (True, False):
        try:
            config = small_config(model, narrow=narrow)
            if not narrow and params(config) * _BYTES_A_PARAM > psutil.virtual_memory().available / 2:
                return False
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            copy = load_dense(folder, decide(TECHNIQUES["full"], "cpu"), torch.device("cpu"))
            with torch.no_grad():
                copy(input_ids=torch.tensor([_rows()[0].input_ids]), use_cache=False)
        except Exception:
            log.info("a small copy of %s does not run", type(model).__name__, exc_info=True)
        else:
            return True
    return False


def small_config(model: Any, *, narrow: bool) -> Any:
    """Returns the base's config with fewer layers, experts and tokens, and if `narrow` a smaller width."""
    config = type(model.config).from_dict(model.config.to_dict())
    _cut(config, model.config.get_text_config().num_hidden_layers, _layers_of_every_kind(model))
    if narrow:
        _narrow(config.get_text_config())
    return config


def _cut(config: Any, of_layers: int, layers: int) -> None:
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, list) and len(value) == of_layers:
                setattr(part, name, value[:layers])  # a value for each layer
        for name in _TOKENS:
            if getattr(part, name, None) is not None:
                setattr(part, name, 0)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    text.vocab_size = min(text.vocab_size, MOST_TOKENS)
    for name in experts.COUNTS:
        if (count := getattr(text, name, None)) is not None:
            groups = getattr(text, "n_group", None) or 1
            chosen = max(4, getattr(text, "num_experts_per_tok", None) or 1, 2 * groups)
            setattr(text, name, min(count, groups * math.ceil(chosen / groups)))


def _narrow(text: Any) -> None:
    """Divides the width and the heads by the same power of two, so that a head keeps its size."""
    heads = getattr(text, "num_attention_heads", None) or 1
    divisor = 1
    while heads % (2 * divisor) == 0 and text.hidden_size % (2 * divisor) == 0:
        if text.hidden_size // (2 * divisor) < LEAST_WIDTH:
            break
        divisor *= 2
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads"):
        if isinstance(size := getattr(text, name, None), int) and size % divisor == 0:
            setattr(text, name, size // divisor)
    if isinstance(groups := getattr(text, "num_key_value_heads", None), int):
        text.num_key_value_heads = max(1, groups // divisor)


def _layers_of_every_kind(model: Any) -> int:
    """Returns how many of the first layers include one of each kind; at least two, at most MOST_LAYERS."""
    text = model.config.get_text_config()
    count = text.num_hidden_layers
    stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if stack is None:
        return int(min(count, MOST_LAYERS))
    said = [value for value in text.to_dict().values() if isinstance(value, list) and len(value) == count]
    kinds = [(_classes(layer), *(str(value[i]) for value in said)) for i, layer in enumerate(stack)]
    needed = max(kinds.index(kind) for kind in kinds) + 1
    return int(min(count, max(2, min(needed, MOST_LAYERS))))


def _classes(layer: nn.Module) -> str:
    return " ".join(f"{name}:{type(module).__name__}" for name, module in layer.named_modules())


def params(config: Any) -> int:
    """Returns the number of parameters of a config's model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _rows() -> list[Row]:
    """Returns two rows of different length, so that one is padded."""
    return [Row(list(range(3, 3 + length)), list(range(3, 3 + length))) for length in (9, 5)]


def _reason(base: Path, technique: Technique) -> str | None:
    """Returns why one training step of `technique` on the model in `base` fails; None if it succeeds."""
    recipe, device = RECIPES[technique.type], torch.device("cpu")
    precision = decide(technique, device.type)
    try:
        model = recipe.prepare(recipe.load_base(base, precision, device), technique, None)
        objective = Objective(model, precision)
        if _mixes_rows(objective, device):
            return "what it computes of a row depends on the rows beside it"
        loss, _ = objective.train()(collate(singles(_rows()), [[0], [1]], device), 1.0)
        loss.backward()
    except (CannotAdapt, CannotQuantise) as error:
        return str(error.fields["reason"])
    except Exception as error:
        log.info("%s on a small copy failed", technique.type, exc_info=True)
        return f"a training step on a small copy of it fails: {_first_line(error)}"
    learning = [p for p in objective.parameters() if p.requires_grad and p.grad is not None]
    return None if learning else "none of its weights receives a gradient"


@torch.no_grad()
def _mixes_rows(objective: Objective, device: torch.device) -> bool:
    """Whether a row has other logits alone than beside a longer one: a model that is not causal reads its padding."""
    rows = singles(_rows())
    *_, beside = objective.eval().row_logits(collate(rows, [[0], [1]], device))
    [alone] = objective.row_logits(collate(rows, [[1]], device))
    return bool((beside - alone).norm() > _ROUNDING * alone.norm())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
