"""Answers that transformers generates in a batch are those of each prompt alone."""

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import zoo

from tunery.planning.precision import decide
from tunery.rows.template import ChatTemplate
from tunery.spec import Qlora
from worker.trainer import generation
from worker.trainer.recipes.qlora import load_quantised

PROMPTS = [[3 + (length * i * 7) % 250 for i in range(length)] for length in (3, 25, 12, 12)]
FAMILIES: dict[str, dict[str, Any]] = {
    "RecurrentGemma": {"lru_width": 64, "head_dim": 16, "attention_window_size": 16, "num_hidden_layers": 3},
    "Rwkv": {"attention_hidden_size": 64},
    "GPT2": {},
}
READ_PADDING = {"RecurrentGemma", "Rwkv"}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_are_those_of_each_prompt_alone(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, template = _made(family, tmp_path)
    wanted = [generation.Greedy(model, template, 4, "here").answer([prompt])[0] for prompt in PROMPTS]

    with caplog.at_level(logging.WARNING):
        assert generation.Greedy(model, template, 4, "here").answer(PROMPTS) == wanted

    assert ("one by one" in caplog.text) == (family in READ_PADDING)


def test_a_batch_of_equal_lengths_says_as_much(tmp_path: Path) -> None:
    """It has no padding of its own, and later batches are not tried again."""
    model, template = _made("RecurrentGemma", tmp_path)
    generation.Greedy(model, template, 4, "here").answer(PROMPTS[2:])
    assert not generation._ROWS_APART[model]


def test_rounding_is_that_of_the_products(tmp_path: Path) -> None:
    """Weights in fp32 may be multiplied in bf16: rounding to that is no difference between a batch and a row."""
    model, _ = _made("GPT2", tmp_path)
    assert generation._multiplied_in(model) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert generation._multiplied_in(model) == {torch.bfloat16}
    packed = load_quantised(tiny_models.llama(tmp_path / "base"), decide(Qlora(), "cpu"), torch.device("cpu"))
    assert torch.bfloat16 in generation._multiplied_in(packed)


def _made(family: str, folder: Path) -> tuple[Any, ChatTemplate]:
    tiny_models.tokenizer(folder)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**zoo.SIZE | FAMILIES[family]), dtype=torch.float32
    ).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, tensor in model.state_dict().items():
            zoo.fill(name, tensor)
    return model, ChatTemplate.load(folder)
