"""RoPE whose frequencies depend on a row's length, so that rows of some lengths cannot share a batch.

transformers chooses frequencies by the longest position of a batch: a row's output would depend on the other rows.
`longrope` (Phi-3) has one set up to the original context and another beyond it; `dynamic` has one up to the context and
another for every length beyond it, and keeps the last one for later batches.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


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


@contextmanager
def rows_apart(model: nn.Module, limits: LengthRope, lengths: Sequence[Sequence[int]]) -> Iterator[None]:
    """Gives each row of a batch its own frequencies inside the block. `lengths`: those of each sequence's rows.

    Examples of other lengths never share a batch (`LengthRope.group`), but the rows of one example have to.
    """
    keys = [[limits.group(length) for length in rows] for rows in lengths]
    if len({key for each in keys for key in each}) < 2:
        yield
        return
    places = {key: _places(lengths, keys, key) for each in keys for key in each}
    modules = {id(module): module for module, _, _ in _embeddings(model)}.values()
    for module in modules:
        module.forward = partial(_group_by_group, module, module.forward, places)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _places(lengths: Sequence[Sequence[int]], keys: list[list[Hashable]], wanted: Hashable) -> tuple[Tensor, Tensor]:
    """Returns the sequences and positions of all tokens whose row has the key."""
    found: list[tuple[int, int]] = []
    for number, (rows, of_rows) in enumerate(zip(lengths, keys, strict=True)):
        start = 0
        for length, key in zip(rows, of_rows, strict=True):
            found += [(number, place) for place in range(start, start + length)] if key == wanted else []
            start += length
    sequences, positions = torch.tensor(found).t()
    return sequences, positions


def _group_by_group(
    module: Any,
    forward: Callable[..., tuple[Tensor, Tensor]],
    places: dict[Hashable, tuple[Tensor, Tensor]],
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Returns the rotary embedding's sines and cosines [sequences, positions, width], with those of each group by its
    own frequencies; 0 for padding.
    """
    positions = position_ids.expand(x.shape[0], -1)
    both: tuple[Tensor, ...] = ()
    for where in places.values():
        _forget(module, None)
        parts = forward(x, positions[where][None], *args, **kwargs)
        both = both or tuple(part.new_zeros(*positions.shape, part.shape[-1]) for part in parts)
        for whole, part in zip(both, parts, strict=True):
            whole[where] = part[0]
    first, second = both
    return first, second


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
