"""QLoRA: LoRA on a base whose linear layers are kept in 4 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tunery.spec import Qlora, Technique
from worker.trainer.recipes.lora import LORA
from worker.trainer.recipes.recipe import Recipe


def load_nf4(folder: Path, technique: Technique, device: torch.device) -> PreTrainedModel:
    """The base quantised while it is read. Embeddings, norms and head stay in bf16 (fp32 on a CPU).

    Why not PEFT's prepare_model_for_kbit_training: it casts those three to fp32, 4 GB of a Llama-3 8B, and the norms
    and the loss compute in fp32 without that.
    """
    knobs = cast(Qlora, technique)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=knobs.quant_type,
        bnb_4bit_use_double_quant=knobs.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, knobs.compute_dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        quantization_config=quantisation,
        device_map={"": device},
        trust_remote_code=False,
    )
    _keep_one_packing(model)
    return cast(PreTrainedModel, model)


def _keep_one_packing(model: torch.nn.Module) -> None:
    """On CPUs with avx512_bf16 bitsandbytes packs the weights anew at the first evaluation, for speed.

    Refused: the new packing rounds the quantisation constants, so that later steps train another model than the first
    did (0.3 % off), and it does not take layers whose outputs are no multiple of 32.
    """
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


QLORA: Recipe = replace(LORA, load_base=load_nf4)
