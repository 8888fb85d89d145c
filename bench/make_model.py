"""Writes a random checkpoint of a known shape with a small tokenizer, so that every trainer loads the same files.

`python bench/make_model.py FOLDER [SHAPE]`; the 8B needs a GPU (16 GB and about 20 s).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

from worker.trainer.general import benchmark

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "small": (256, 768, 6, 8, 4, 640),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama3-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000),
    "llama3-70b": (8192, 28672, 80, 64, 8, 128256),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936),
    "qwen3-30b-a3b": (2048, 6144, 16, 32, 4, 151936),  # 16 of its 48 layers
    "small-moe": (64, 96, 2, 4, 2, 640),
}
EXPERTS = {"qwen3-30b-a3b": (128, 8, 768), "small-moe": (8, 2, 48)}
"""Of a mixture: experts of a layer, experts of a token, their intermediate size. These have the family Qwen3Moe."""
QWEN3_HEAD = 128
INDEX = "model.safetensors.index.json"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENS = 8000
"""The tokenizer's size, where the vocabulary has so many."""


def make(folder: Path, shape: str, most_layers: int | None = None) -> None:
    """Writes config, tokenizer and weights (normal, deviation 0.02, bf16) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    layers = min(layers, most_layers or layers)
    is_qwen3, is_tied = shape.startswith("qwen3") or shape in EXPERTS, shape == "qwen3-0.6b"
    family = _family(shape)
    config = family(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=131072, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=is_tied, dtype="bfloat16",
        architectures=[family.__name__.replace("Config", "ForCausalLM")],
        **({"head_dim": QWEN3_HEAD} if is_qwen3 else {}), **_of_mixture(shape),
    )  # fmt: skip
    config.save_pretrained(folder)
    _tokenizer(min(TOKENS, vocabulary)).save_pretrained(folder)
    head = QWEN3_HEAD if is_qwen3 else hidden // heads
    width, kv = head * heads, head * kv_heads
    linears = {
        "self_attn.q_proj": (width, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, width), **_feed_forward(shape, hidden, inner),
    }  # fmt: skip
    torch.manual_seed(0)
    shards = {
        "ends.safetensors": {
            "model.embed_tokens.weight": _random(vocabulary, hidden),
            **({} if is_tied else {"lm_head.weight": _random(vocabulary, hidden)}),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head} if is_qwen3 else {}
    _write(folder, shards, index := {})
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shard = {f"{prefix}{name}.weight": _random(*shape) for name, shape in linears.items()}
        for norm, size in norms.items():
            shard[f"{prefix}{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        _write(folder, {f"layer-{layer:02d}.safetensors": shard}, index)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _family(shape: str) -> type[PretrainedConfig]:
    if shape in EXPERTS:
        return Qwen3MoeConfig
    return Qwen3Config if shape.startswith("qwen3") else LlamaConfig


def _of_mixture(shape: str) -> dict[str, Any]:
    if shape not in EXPERTS:
        return {}
    count, chosen, inner = EXPERTS[shape]
    return {
        "num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": inner, "norm_topk_prob": True,
    }  # fmt: skip


def _feed_forward(shape: str, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """Returns the shapes of a layer's feed-forward weights: one block's, or those of the router and every expert."""
    blocks, found = ["mlp"], {}
    if shape in EXPERTS:
        count, _, inner = EXPERTS[shape]
        blocks, found = [f"mlp.experts.{i}" for i in range(count)], {"mlp.gate": (count, hidden)}
    for name in blocks:
        found |= {f"{name}.gate_proj": (inner, hidden), f"{name}.up_proj": (inner, hidden)}
        found[f"{name}.down_proj"] = (hidden, inner)
    return found


def ready(models: Path, shape: str) -> Path:
    """Returns the folder of a shape's checkpoint below `models`; writes it if it is missing."""
    folder = models / shape
    if not (folder / INDEX).exists():
        make(folder, shape)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folder


def _random(*shape: int) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()


def _write(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: dict[str, str]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))


def _tokenizer(size: int = TOKENS) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of at most `size` tokens, learned from the general benchmark's English.

    The roles are tokens, and letters like Q and X are never merged, so that rows can be made of known lengths.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{item.prefix} {choice}" for item in benchmark.load_items() for choice in item.choices)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=131072, chat_template=TEMPLATE,
    )  # fmt: skip


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "llama3-8b")
