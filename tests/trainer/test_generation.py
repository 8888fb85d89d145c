"""Answers that transformers generates in a batch are those of each prompt alone."""

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import zoo

from tunery.rows.template import ChatTemplate
from worker.trainer import generation

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
    tiny_models.tokenizer(tmp_path)
    template = ChatTemplate.load(tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**zoo.SIZE | FAMILIES[family]), dtype=torch.float32
    ).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, tensor in model.state_dict().items():
            zoo.fill(name, tensor)
    wanted = [generation.Greedy(model, template, 4, "here").answer([prompt])[0] for prompt in PROMPTS]

    with caplog.at_level(logging.WARNING):
        assert generation.Greedy(model, template, 4, "here").answer(PROMPTS) == wanted

    assert ("one by one" in caplog.text) == (family in READ_PADDING)
