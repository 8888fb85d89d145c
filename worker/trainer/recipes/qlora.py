"""QLoRA: LoRA on a base whose linear layers are kept in 4 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tunery.failures import CannotQuantise
from tunery.planning.precision import Precision
from worker.trainer.precision import dtype
from worker.trainer.recipes import targets
from worker.trainer.recipes.ahead import copied_ahead
from worker.trainer.recipes.lora import LORA
from worker.trainer.recipes.recipe import Recipe


def load_quantised(folder: Path, precision: Precision, device: torch.device) -> PreTrainedModel:
    """Loads the base, which is quantised while it is read. Embeddings, norms and head stay in `precision.dense`.

    Why not PEFT's prepare_model_for_kbit_training: it casts those three to fp32, 4 GB for a Llama-3 8B, while the norms
    and the loss compute in fp32 anyway. Raises CannotQuantise.
    """
    _refuse_experts(folder)
    with copied_ahead(device):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype(precision.dense),
            quantization_config=BitsAndBytesConfig(**quantisation(precision)),
            device_map={"": device},
            trust_remote_code=False,
        )
    keep_one_packing(model)
    return cast(PreTrainedModel, model)


def _refuse_experts(folder: Path) -> None:
    """Raises CannotQuantise for a model with experts: they are not linear layers and would stay unquantised."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    stay = targets.experts(model)
    if stay:
        weights = sum(parameter.numel() for parameter in stay.values())
        fraction = weights / sum(parameter.numel() for parameter in model.parameters())
        raise CannotQuantise(
            reason=f"its experts, {fraction:.0%} of its weights, are not layers that bitsandbytes can quantise."
        )


def quantisation(precision: Precision) -> dict[str, Any]:
    """Returns the arguments of the BitsAndBytesConfig for a base in four bits."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": precision.base,
        "bnb_4bit_use_double_quant": precision.double_quant,
        "bnb_4bit_compute_dtype": precision.compute,
    }


def keep_one_packing(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking the weights at the first evaluation, as it does on CPUs with avx512_bf16.

    The faster packing rounds the quantisation constants, so that later steps would train another model than the first
    ones (0.3 % off), and it does not support layers whose outputs are not multiples of 32.
    """
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


QLORA: Recipe = replace(LORA, load_base=load_quantised)
