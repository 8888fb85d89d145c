"""Applies the adapters of one base to the rows of a pass: each row has its own, or none.

PEFT's `adapter_names` loops over the adapters in every layer; here each layer computes two batched products for all
adapters of one shape, whatever their number, or on a CUDA device runs two kernels if each row reads one token. Layers
add nothing while no row has an adapter.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
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
from worker.server.lane import Located

try:
    from worker.server import lora_triton
except ImportError:  # a CPU build of torch has no Triton
    lora_triton = None  # type: ignore[assignment]


@dataclass(frozen=True)
class _Group:
    """Rows of a pass whose adapters have one shape. All indices are on the device.

    `layers`: by name A transposed (adapters x inputs x rank) and B (adapters x rank x outputs). `rows`: for each
    adapter as many rows of the pass as the busiest has, some of them twice. `targets[i]` is the row of the pass whose
    result is at `places[i]` among these. None, None, None: row i of the pass has adapter i.
    """

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    rows: torch.Tensor | None
    places: torch.Tensor | None
    targets: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """The groups of a pass, as long as none of the adapters moves."""

    groups: list[_Group]
    stacks: tuple[Stack, ...]
    version: int

    @property
    def is_stale(self) -> bool:
        return _version(self.stacks) != self.version


_PLANS = 4
"""Plans that are kept: prompts and running rows alternate, and so do lanes."""


def kernel_for(device: torch.device) -> Callable[..., None] | None:
    """Returns what adds the adapters of rows that read one token each (`lora_triton.add`); None: batched products."""
    return lora_triton.add if lora_triton is not None and device.type == "cuda" else None


class Bank:
    """The adapters of one base. Passes run in one thread; adapters are added and removed in others."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._stacks: dict[tuple[Site, ...], Stack] = {}
        self._stack_of: dict[Factors, Stack] = {}
        self._hooked: set[str] = set()
        self._kernel = kernel_for(self._device)
        self._groups: list[_Group] = []
        self._located = Located()
        self._plans: OrderedDict[tuple[Factors | None, ...], _Plan] = OrderedDict()
        self._picked: tuple[torch.Tensor | None, dict[int, torch.Tensor]] = None, {}
        self._lock = Lock()

    def add(self, factors: Factors) -> None:
        """Adds an adapter."""
        with self._lock:
            self._stack_of[factors] = self._stacks.setdefault(factors.sites, Stack(factors.sites, self._device))
            for site in factors.sites:
                if site.name not in self._hooked:
                    self._hooked.add(site.name)
                    self._model.get_submodule(site.name).register_forward_hook(partial(self._lay, site.name))

    def remove(self, factors: Factors) -> None:
        """Frees an adapter that no row uses."""
        with self._lock:
            self._stack_of.pop(factors).forget(factors)
            for rows in [rows for rows in self._plans if factors in rows]:
                del self._plans[rows]

    @contextmanager
    def on(self, adapters: Sequence[Factors | None]) -> Iterator[None]:
        """Gives row i of each pass in the block adapters[i]; None: the base alone."""
        self._groups = self._plan(tuple(adapters))
        try:
            yield
        finally:
            self._groups, self._picked = [], (None, {})

    def locate(self, adapters: Sequence[Factors | None]) -> Located | None:
        """Returns where the rows' adapters are now; None: they can only be applied by `on`."""
        with self._lock:
            stacks = self._stacks_of(adapters)
            if stacks and self._kernel is None:
                return None
            return Located(stacks, tuple(self._addresses(stack, adapters) for stack in stacks))

    @contextmanager
    def at(self, located: Located) -> Iterator[None]:
        """Gives rows that read one token each the adapters at these addresses."""
        self._located = located
        try:
            yield
        finally:
            self._located = Located()

    def _stacks_of(self, adapters: Sequence[Factors | None]) -> tuple[Stack, ...]:
        """Returns the stacks of the rows' adapters, in the same order for any order of rows."""
        used = {self._stack_of[one] for one in adapters if one is not None}
        return tuple(stack for stack in self._stacks.values() if stack in used)

    def _addresses(self, stack: Stack, adapters: Sequence[Factors | None]) -> torch.Tensor:
        own = [None if one is None or self._stack_of[one] is not stack else one for one in adapters]
        return torch.tensor([0 if one is None else stack.row(one).data_ptr() for one in own], device=self._device)

    def _plan(self, rows: tuple[Factors | None, ...]) -> list[_Group]:
        with self._lock:
            plan = self._plans.pop(rows, None)
            if plan is None:
                stacks = self._stacks_of(rows)
                plan = _Plan([self._group(stack, rows) for stack in stacks], stacks, _version(stacks))
                for others in [others for others, other in self._plans.items() if other.is_stale]:
                    del self._plans[others]
            self._plans[rows] = plan
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return plan.groups

    def _group(self, stack: Stack, adapters: Sequence[Factors | None]) -> _Group:
        rows: dict[Factors, list[int]] = {}
        for row, one in enumerate(adapters):
            if one is not None and self._stack_of[one] is stack:
                rows.setdefault(one, []).append(row)
        block, order = stack.gather(list(rows)) if len(rows) > 1 else (stack.row(next(iter(rows))), list(rows))
        pairs = split(block, stack.sites)
        layers = {site.name: (a.transpose(1, 2), b) for site, (a, b) in zip(stack.sites, pairs, strict=True)}
        return _Group(layers, *self._indices([rows[one] for one in order], len(adapters)))

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
        for stack, addresses in zip(self._located.shapes, self._located.addresses, strict=True):
            if name in stack.starts:
                self._add_located(stack, name, x, addresses, out, is_packed)
        for number, group in enumerate(self._groups):
            if name in group.layers:
                a, b = group.layers[name]
                _add(group, a, b, self._pick(number, x, a.dtype), out, is_packed)

    def _add_located(
        self, stack: Stack, name: str, x: torch.Tensor, addresses: torch.Tensor, out: torch.Tensor, is_packed: bool
    ) -> None:
        start, site = stack.starts[name]
        assert self._kernel is not None
        self._kernel(
            x, addresses, out, start=start, rank=site.rank, inputs=site.inputs, outputs=site.outputs,
            is_aligned=stack.is_aligned, rounds_twice=is_packed,
        )  # fmt: skip

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


def _version(stacks: Sequence[Stack]) -> int:
    return sum(stack.version for stack in stacks)


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
