"""The adapters of a model in the type of its products, cast once per pass.

Adapters are kept in fp32 and multiplied in bf16. Casts of each A and B in each layer, forward and backward, and
concatenations of the As of one input would be 26 small kernels a layer. `Casts` has all of them in one buffer, which a
few launches fill at the beginning of each pass, whatever has changed the weights since the last one. The As of one
input lie one behind the other, so that their concatenation is a view.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 128
"""Numbers to a multiple of which a factor begins, as if it were allocated alone: the fastest products need that."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's A [r, in] and B [out, r], and the type of their products. Those of one `input` have equal ones."""

    a: Tensor
    b: Tensor
    dtype: torch.dtype
    input: Hashable


@dataclass(frozen=True)
class Cast:
    """An adapter's A and B in the type of their products."""

    a: Tensor
    b: Tensor


class Casts:
    """The casts of a model's adapters. They are those of the last `update`."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Allocates them. Adapters that have the type of their products are left out, as they need no cast."""
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._of: dict[tuple[int, int], Cast] = {}
        wide = [each for each in adapters if each.dtype != each.a.dtype]
        for dtype in dict.fromkeys(each.dtype for each in wide):
            self._allocate([each for each in wide if each.dtype == dtype], dtype)

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self._targets)

    @torch.no_grad()
    def update(self) -> None:
        """Casts all adapters as they are now."""
        if self._sources:
            torch._foreach_copy_(self._targets, self._sources)

    def of(self, a: Tensor, b: Tensor) -> Cast | None:
        """Returns the cast of an adapter's A and B; None of one that is not here."""
        return self._of.get((id(a), id(b)))

    def _allocate(self, adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
        inputs: dict[Hashable, list[Tensor]] = {}
        for each in adapters:
            inputs.setdefault(each.input, []).append(each.a)
        runs = [*inputs.values(), *([each.b] for each in adapters)]
        sizes = [sum(part.numel() for part in run) for run in runs]
        flat = torch.empty(sum(map(_aligned, sizes)), dtype=dtype, device=adapters[0].a.device)
        made: dict[int, Tensor] = {}
        start = 0
        for run, size in zip(runs, sizes, strict=True):
            parts = flat[start : start + size].split([part.numel() for part in run])
            made |= {id(source): part.view(source.shape) for source, part in zip(run, parts, strict=True)}
            start += _aligned(size)
        for each in adapters:
            self._of[id(each.a), id(each.b)] = Cast(made[id(each.a)], made[id(each.b)])
            self._sources += [each.a, each.b]
            self._targets += [made[id(each.a)], made[id(each.b)]]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Returns the concatenation of matrices [*, in] as a view; None if they do not lie one behind the other."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.storage_offset() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += part.numel()
    return first.as_strided((sum(len(part) for part in parts), first.shape[1]), first.stride())


_current: Casts | None = None


def current() -> Casts | None:
    """Returns the casts of the running pass."""
    return _current


@contextmanager
def using(casts: Casts | None) -> Iterator[None]:
    """Makes layers use these casts inside the block; each casts for itself if None."""
    global _current
    before, _current = _current, casts
    try:
        yield
    finally:
        _current = before
