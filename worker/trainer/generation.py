"""A model's own text: what it writes after each of a batch of prompts."""

from typing import Any

import torch
from transformers import GenerationConfig

from tunery.rows.template import ChatTemplate
from worker.trainer import rope

Prompts = list[list[int]]
"""The ids of each prompt."""


def greedy(causal: Any, template: ChatTemplate, prompts: Prompts, limit: int) -> list[list[int]]:
    """Returns the likeliest ids after each prompt, at most `limit` of them; a stop token and padding may end them."""
    return _generate(causal, template, prompts, limit, do_sample=False)


def sample(causal: Any, template: ChatTemplate, prompts: Prompts, limit: int, temperature: float) -> list[list[int]]:
    """Ids drawn from the model's whole distribution at a temperature, as `greedy` gives them."""
    return _generate(causal, template, prompts, limit, do_sample=True, temperature=temperature, top_k=0, top_p=1.0)


def _generate(
    causal: Any, template: ChatTemplate, prompts: Prompts, limit: int, **sampling: bool | float
) -> list[list[int]]:
    """One batch, padded at the left so that every answer starts in the same column."""
    width = max(map(len, prompts))
    # Keys in a cache were turned by the frequencies of a shorter row: where those change, there can be none.
    changes = rope.of(causal).changes(width, width + limit)
    pad = min(template.eos_ids)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=causal.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=causal.device)
    config = GenerationConfig(
        **sampling,
        max_new_tokens=limit,
        eos_token_id=sorted(template.eos_ids),
        pad_token_id=pad,
        use_cache=not changes,
    )
    plain, causal.generation_config = causal.generation_config, config
    try:
        # Why the config is exchanged: generate() fills gaps from the model's own, where a repetition penalty may lurk.
        # Not synced: `Ranks.lockstep` keeps the ranks of a model in pieces together, whatever passes they make.
        out = causal.generate(input_ids=ids, attention_mask=mask, synced_gpus=False)
    finally:
        causal.generation_config = plain
    return [list(map(int, row)) for row in out[:, width:].tolist()]
