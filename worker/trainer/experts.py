"""Recognises mixtures of experts by their config."""

from typing import Any

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The config keys, by family, that say how many routed experts a layer has."""


def are_in(config: Any) -> bool:
    """Whether layers of this config route tokens to experts."""
    return any(getattr(config, name, None) for name in COUNTS)


def idle(config: Any, count: int) -> int:
    """Returns how many of all routed experts' `count` weights a token does not pass through."""
    experts = next((found for name in COUNTS if (found := getattr(config, name, None))), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    return count - count * chosen // experts if experts else 0
