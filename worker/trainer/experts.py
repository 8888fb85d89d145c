"""Recognises mixtures of experts by their config."""

from typing import Any

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The config keys, by family, that say how many routed experts a layer has."""


def are_in(config: Any) -> bool:
    """Whether layers of this config route tokens to experts."""
    return any(getattr(config, name, None) for name in COUNTS)
