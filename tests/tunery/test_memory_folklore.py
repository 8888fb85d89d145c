"""Common rules of thumb about memory: docs/memory.md has the figures that our estimate computes for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunery.planning import activations, memory, peak
from tunery.planning.peak import Setting, Step
from tunery.planning.shape import trainable_params
from tunery.spec import Full, Lora, Qlora, Technique

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "params": 6_738_415_616,
}
ONE_MATRIX = {"hidden_size": 4096, "num_hidden_layers": 1, "vocab_size": 32000}
Q_AND_V = Lora(r=8, target_modules=["q_proj", "v_proj"])


def of(technique: Technique) -> Setting:
    return Setting.of(LLAMA_2_7B, technique, "cuda", "adamw", 1)


def state(technique: Technique) -> float:
    """GB of weights, gradients and optimizer moments."""
    rest = peak.at_rest(of(technique))
    return (rest["base"] + rest["optimizer"] + of(technique).gradient_bytes) / 1e9


def qlora() -> peak.Estimate:
    return peak.peak(of(Qlora()), Step(2048, 2047, recompute=32))


def gib(*names: str) -> float:
    return sum(qlora().parts[name] for name in names) / 2**30


def adapter() -> int:
    return trainable_params(LLAMA_2_7B, Q_AND_V)


def kept() -> int:
    setting = of(Full())
    return setting.shape.layers * activations.kept(setting.shape, setting.technique, setting.precision)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (lambda: f"{peak.at_rest(of(Lora()))['base'] / 1e9:.1f} GB", "| 7B in fp16: 14 GB | 13.5 GB |"),
        (lambda: f"{state(Full(weights_dtype='float32')):.1f} GB", "| full fine-tune: 4 x, 112 GB | 107.8 GB |"),
        (lambda: f"{16 * 7.0:.0f} GB", "16 bytes each, of 7.0 billion 112 GB"),
        (
            lambda: (
                f"{memory.estimate(LLAMA_2_7B, Full(weights_dtype='float32'), max_seq_length=2048).bytes / 1e9:.1f} GB"
            ),
            "ours is at least 108.8 GB",
        ),
        (lambda: f"{8 * LLAMA_2_7B['params'] / 1e9:.1f} GB", "| full fine-tune: 2 x, 56 GB | 53.9 GB |"),
        (lambda: f"{kept() / 1e6:.1f} MB", "4.2 MB a token"),
        (lambda: f"{kept() * 8 * 2048 / 1e9:.0f} GB", "69 GB for 8 rows of 2,048"),
        (lambda: f"{state(Full()):.1f} GB", "in eight bits: 40.6 GB"),
        (lambda: f"{qlora().bytes / 2**30:.2f} GiB", "| QLoRA: 5 GB | 5.25 GiB |"),
        (lambda: f"{gib('base'):.2f} of the base", "3.60 of the base"),
        (lambda: f"{gib('adapter', 'gradients', 'optimizer'):.2f} of adapters", "0.60 of adapters"),
        (lambda: f"{gib('casts'):.2f} of the adapters in bf16", "0.07 of the adapters in bf16"),
        (lambda: f"{gib('activations'):.2f} of activations", "0.74 of activations"),
        (lambda: f"{gib('head', 'workspaces'):.2f} of the last", "0.24 of the last"),
        (
            lambda: f"{memory.estimate(LLAMA_2_7B, Qlora(), max_seq_length=2048).bytes / 2**30:.2f} GiB",
            "is with the driver's context 5.00 GiB",
        ),
        (lambda: f"{trainable_params(ONE_MATRIX, Lora(r=8, target_modules=['q_proj'])):,}", "| 65,536 of 16,777,216"),
        (lambda: f"{1 - 65_536 / 4096**2:.1%} fewer".replace("%", " %"), "99.6 % fewer | 8 x (4096 + 4096)"),
        (lambda: f"{adapter():,} of {adapter() + LLAMA_2_7B['params']:,}", "| 4,194,304 of 6,742,609,920, 0.06 % |"),
        (lambda: f"{adapter() / (adapter() + LLAMA_2_7B['params']):.2%}".replace("%", " %"), ", 0.06 % |"),
    ],
)
def test_what_is_often_said_is_counted(count: Callable[[], str], said: str) -> None:
    assert said in PAGE
    assert count() in said
