"""Generates a model's text after each of a batch of prompts."""

from typing import Any

import torch
from transformers import GenerationConfig

from tunery.rows.template import ChatTemplate
from worker.trainer import rope

Prompts = list[list[int]]
"""Token ids of each prompt."""


def greedy(causal: Any, template: ChatTemplate, prompts: Prompts, limit: int) -> list[list[int]]:
    """Returns the likeliest ids after each prompt, at most `limit` of them; a stop token and padding may end them."""
    return _generate(causal, template, prompts, limit, do_sample=False)


def sample(causal: Any, template: ChatTemplate, prompts: Prompts, limit: int, temperature: float) -> list[list[int]]:
    """Returns ids drawn from the model's whole distribution at a temperature, in the form of `greedy`."""
    return _generate(causal, template, prompts, limit, do_sample=True, temperature=temperature, top_k=0, top_p=1.0)


def _generate(
    causal: Any, template: ChatTemplate, prompts: Prompts, limit: int, **sampling: bool | float
) -> list[list[int]]:
    """Generates one batch, padded at the left so that every answer starts in the same column."""
    width = max(map(len, prompts))
    # Cached keys were rotated by the frequencies of a shorter row: if those change, no cache can be used.
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
        # Why the config is replaced: generate() takes unset options from the model's own, such as a repetition penalty.
        # Not synced: `Ranks.lockstep` keeps the ranks of a sharded model together, whatever passes they run.
        out = causal.generate(input_ids=ids, attention_mask=mask, synced_gpus=False)
    finally:
        causal.generation_config = plain
    return [list(map(int, row)) for row in out[:, width:].tolist()]
