"""A step over a cache gives the logits of a pass over each whole row, in all families whose rows share passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

from worker.trainer.decoding import passes
from worker.trainer.decoding.cache import Cache
from worker.trainer.decoding.passes import Passes

KNOWN: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3-MoE": {},
    "Mixtral": {},
    "Gemma 2": {"attn_logit_softcapping": 0.5},  # scores that the usual 50 would leave as they are
    "Gemma 3": {},
    "Mistral": {},
    "Phi": {},
    "Phi-3": {},
    "Granite": {},
    "Cohere2": {},
    "SmolLM3": {},
    "GPT-OSS": {},
}
"""Families, and what makes the particular of their attention count."""
LENGTHS = (5, 30, 60)
"""Tokens of rows, the first of which are within the windows of 16."""


@pytest.mark.parametrize("family", KNOWN)
def test_a_step_gives_the_logits_of_whole_rows(family: str, tmp_path: Path) -> None:
    base = zoo.make(family, tmp_path / "base", **KNOWN[family])
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert passes.are_known(model)
    rows = [[3 + i * 7 * length % 250 for i in range(length)] for length in LENGTHS]
    with torch.no_grad():
        cache = Cache(model)
        made = Passes(model, cache)
        cache.allocate(len(rows), 80)
        for slot, row in enumerate(rows):
            made.read(torch.tensor([row]), cache.place([slot], [list(range(len(row)))]))
        found = made.step(torch.full((len(rows), 1), 9), torch.tensor([[length] for length in LENGTHS]), reach=72)
        wanted = [model(input_ids=torch.tensor([[*row, 9]]), use_cache=False).logits[0, -1] for row in rows]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)
