"""Applies the adapters of one base to the rows of a pass: each row has its own, or none.

PEFT's `adapter_names` loops over the adapters in every layer; here each layer computes two batched products for all
adapters of one shape, whatever their number, or on a CUDA device runs two kernels if each row reads one token. Layers
add nothing while no row has an adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import Lock
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from worker.server.factors import Factors, Site, Stack, split
from worker.server.lane import Laid

try:
    from worker.server import lora_triton
except ImportError:  # a CPU build of torch has no Triton
    lora_triton = None  # type: ignore[assignment]


@dataclass(frozen=True)
class _Group:
    """Rows of a pass whose adapters have one shape. All indices are on the device.

    `layers`: by name A transposed (adapters x inputs x rank) and B (adapters x rank x outputs). `adapters`: for each
    row of the pass its adapter; -1: none of these. `rows`: for each adapter as many rows of the pass as the busiest
    has, some of them twice. `targets[i]` is the row of the pass whose result is at `places[i]` among these. None, None,
    None: row i of the pass has adapter i.
    """

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    adapters: torch.Tensor
    rows: torch.Tensor | None
    places: torch.Tensor | None
    targets: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """The groups of a pass. The same object comes again while the same rows' adapters are at the same addresses."""

    groups: list[_Group]


_NONE = _Plan([])


class Bank:
    """The adapters of one base. Passes run in one thread; adapters are added and removed in others."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._stacks: dict[tuple[Site, ...], Stack] = {}
        self._hooked: set[str] = set()
        self._groups: list[_Group] = []
        self._known: tuple[list[Factors | None], _Plan] = [], _NONE
        self._one: tuple[Factors | None, int, _Plan] = None, 0, _NONE
        self._picked: tuple[torch.Tensor | None, dict[int, torch.Tensor]] = None, {}
        self._lock = Lock()

    def add(self, factors: Factors) -> None:
        """Adds an adapter."""
        with self._lock:
            self._stacks.setdefault(factors.sites, Stack(factors.sites, self._device))
            for site in factors.sites:
                if site.name not in self._hooked:
                    self._hooked.add(site.name)
                    self._model.get_submodule(site.name).register_forward_hook(partial(self._lay, site.name))

    def remove(self, factors: Factors) -> None:
        """Frees an adapter that no row uses."""
        with self._lock:
            self._stacks[factors.sites].forget(factors)
            self._one = None, 0, _NONE

    @contextmanager
    def on(self, adapters: Sequence[Factors | None]) -> Iterator[Laid]:
        """Gives row i of each pass in the block adapters[i]; None: the base alone."""
        plan = self._plan(list(adapters))
        self._groups = plan.groups
        try:
            yield Laid(plan, self._version())
        finally:
            self._groups, self._picked = [], (None, {})

    def _version(self) -> int:
        with self._lock:
            return sum(stack.version for stack in self._stacks.values())

    def _plan(self, adapters: list[Factors | None]) -> _Plan:
        if len(adapters) == 1:
            return self._plan_one(adapters[0])
        known, plan = self._known
        if known != adapters:  # compared by identity: equal lists of the same rows come step after step
            shapes = dict.fromkeys(one.sites for one in adapters if one is not None)
            with self._lock:
                groups = [self._group(self._stacks[sites], adapters) for sites in shapes]
            plan = _Plan(groups) if groups else _NONE
            self._known = adapters, plan
        return plan

    def _plan_one(self, one: Factors | None) -> _Plan:
        """Plans a row alone, whose adapter other passes may have moved."""
        if one is None:
            return _NONE
        with self._lock:
            known, version, plan = self._one
            stack = self._stacks[one.sites]
            if known is not one or version != stack.version:
                plan = _Plan([self._group(stack, [one])])
                self._one = one, stack.version, plan
            return plan

    def _group(self, stack: Stack, adapters: list[Factors | None]) -> _Group:
        rows: dict[Factors, list[int]] = {}
        for row, one in enumerate(adapters):
            if one is not None and one.sites == stack.sites:
                rows.setdefault(one, []).append(row)
        block, order = stack.gather(list(rows)) if len(rows) > 1 else (stack.row(next(iter(rows))), list(rows))
        pairs = split(block, stack.sites)
        layers = {site.name: (a.transpose(1, 2), b) for site, (a, b) in zip(stack.sites, pairs, strict=True)}
        own = {row: place for place, one in enumerate(order) for row in rows[one]}
        places = torch.tensor([own.get(row, -1) for row in range(len(adapters))], dtype=torch.int32)
        return _Group(layers, places.to(self._device), *self._indices([rows[one] for one in order], len(adapters)))

    def _indices(self, rows: list[list[int]], count: int) -> tuple[torch.Tensor | None, ...]:
        if rows == [[row] for row in range(count)]:
            return None, None, None
        most = max(map(len, rows))
        taken = [own + own[:1] * (most - len(own)) for own in rows]
        found = [(row, at * most + i) for at, own in enumerate(rows) for i, row in enumerate(own)]
        targets, places = zip(*found, strict=True)
        made = [list(chain.from_iterable(taken)), places, targets]
        return tuple(torch.tensor(one, device=self._device) for one in made)

    def _lay(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], out: torch.Tensor) -> None:
        """Adds the rows' adapters to a layer's output."""
        x, is_packed = inputs[0], isinstance(layer, Linear4bit)
        for number, group in enumerate(self._groups):
            if name not in group.layers:
                continue
            a, b = group.layers[name]
            if lora_triton is not None and x.is_cuda and x.shape[1] == 1:
                lora_triton.add(x, a, b, group.adapters, out, rounds_twice=is_packed)
            else:
                _add(group, a, b, self._pick(number, x, a.dtype), out, is_packed)

    def _pick(self, number: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns a group's rows of x (rows x tokens x inputs) in the adapters' type; layers with the same input share
        them.
        """
        if self._picked[0] is not x:
            self._picked = x, {}
        found, rows = self._picked[1], self._groups[number].rows
        if number not in found:
            found[number] = (x if rows is None else x[rows]).to(dtype)
        return found[number]


def _add(group: _Group, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, out: torch.Tensor, is_packed: bool) -> None:
    """Adds the adapters' products with the group's rows x (rows x tokens x inputs) to `out` in place."""
    tokens = x.shape[1]
    lora_hidden = torch.bmm(x.reshape(a.shape[0], -1, a.shape[1]), a)
    if group.targets is None and out.dtype == b.dtype:
        out.baddbmm_(lora_hidden, b)
        return
    delta = torch.bmm(lora_hidden, b).view(-1, tokens, b.shape[2])
    if is_packed:
        delta = delta.to(out.dtype)  # as PEFT does on a 4-bit layer; on others it adds in fp32 and rounds once
    if group.targets is None:
        out += delta
    elif out.dtype == delta.dtype:
        out.index_add_(0, group.targets, delta[group.places])
    else:
        out[group.targets] = (out[group.targets] + delta[group.places]).to(out.dtype)
