"""RoPE whose frequencies depend on a row's length, so that rows of some lengths cannot share a batch.

transformers chooses frequencies by the longest position of a batch: a row's output would depend on the other rows.
`longrope` (Phi-3) has one set up to the original context and another beyond it; `dynamic` has one up to the context and
another for every length beyond it, and keeps the last one for later batches.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LengthRope:
    """The lengths up to which a model's frequencies are the original ones, for both kinds of RoPE; empty: they never
    change.
    """

    longrope: frozenset[int] = frozenset()
    dynamic: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.longrope or self.dynamic)

    def group(self, length: int) -> Hashable:
        """Returns a key that is equal for rows with the same frequencies."""
        sides = tuple(length > limit for limit in sorted(self.longrope))
        return sides, tuple(max(length, limit) for limit in sorted(self.dynamic))

    def changes(self, shorter: int, longer: int) -> bool:
        """Whether a row that grows from one length to another needs other frequencies, and so a new cache."""
        return self.group(shorter) != self.group(longer)


def install(model: nn.Module) -> LengthRope:
    """Makes `dynamic` RoPE forget earlier batches; returns the lengths at which the model's RoPE changes."""
    for module, _, kind in _embeddings(model):
        if kind == "dynamic":
            module.register_forward_pre_hook(_forget)
    return of(model)


def of(model: nn.Module) -> LengthRope:
    """Returns the lengths at which the model's RoPE changes."""
    limits: dict[str, set[int]] = {"longrope": set(), "dynamic": set()}
    for module, layer_type, kind in _embeddings(model):
        limits[kind].add(_limit(module, layer_type, kind))
    return LengthRope(frozenset(limits["longrope"]), frozenset(limits["dynamic"]))


def _embeddings(model: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """Yields rotary embeddings that depend on the length: the module, its layers' type, `longrope` or `dynamic`."""
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, name in types.items() if isinstance(types, dict) else [(None, types)]:
            if name == "longrope":
                yield module, layer_type, "longrope"
            elif isinstance(name, str) and "dynamic" in name:
                yield module, layer_type, "dynamic"


def _limit(module: Any, layer_type: str | None, kind: str) -> int:
    if kind == "dynamic":
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    name = "original_max_position_embeddings"
    return int(parameters.get(name) or getattr(module.config, name))


def _forget(module: Any, _inputs: Any) -> None:
    """Restores the original frequencies; the forward pass that follows computes others if needed."""
    for other, layer_type, kind in _embeddings(module):
        if other is module and kind == "dynamic":
            prefix = "" if layer_type is None else f"{layer_type}_"
            original = getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
