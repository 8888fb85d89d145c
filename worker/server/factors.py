"""Reads each plain LoRA adapter into one tensor, and stacks those of equal shape."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn

from worker.server.folders import WEIGHTS
from worker.trainer import experts

_PREFIX = "base_model.model."
_UNDERSTOOD = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Fields of PEFT's config that change nothing here, or are read below. Others must be absent, null or false."""
_WITHOUT_WEIGHTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not change the base's weights."""


@dataclass(frozen=True)
class Site:
    """A linear layer that an adapter changes: A is rank x inputs, B outputs x rank."""

    name: str
    rank: int
    inputs: int
    outputs: int

    @property
    def numel(self) -> int:
        return self.rank * (self.inputs + self.outputs)


class Factors:
    """An adapter's A and B for all its sites, B transposed and scaled, concatenated in a row of fp32.

    `flat` is None while the row is in a stack.
    """

    def __init__(self, sites: tuple[Site, ...], flat: torch.Tensor) -> None:
        self.sites = sites
        self.flat: torch.Tensor | None = flat
        self.nbytes = flat.nbytes

    @classmethod
    def read(cls, folder: Path, model: nn.Module) -> "Factors | None":
        """Returns a folder's adapter for this base; None if it is more than A and B on plain linear layers."""
        config = json.loads((folder / "adapter_config.json").read_text())
        if not _is_plain(config):
            return None
        device = next(model.parameters()).device
        pairs = _pairs(load_file(folder / WEIGHTS, str(device)))
        layers = dict(model.named_modules())
        if pairs is None or not all(_fits(layers.get(name), *pair) for name, pair in pairs.items()):
            return None
        if _has_experts(model) and not all(".self_attn." in name for name in pairs):
            return None
        sites = tuple(Site(name, a.shape[0], a.shape[1], b.shape[0]) for name, (a, b) in sorted(pairs.items()))
        # On the model's device: transposing an adapter of an 8B model takes a CPU longer than reading it from storage.
        flat = torch.empty(sum(site.numel for site in sites), dtype=torch.float32, device=device)
        for (a, b), site in zip(split(flat[None], sites), sites, strict=True):
            factor_a, factor_b = pairs[site.name]
            a[0] = factor_a
            b[0] = factor_b.float().T * _scaling(config, site)
        return cls(sites, flat)


def split(rows: torch.Tensor, sites: Sequence[Site]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns A (rows x rank x inputs) and B (rows x rank x outputs) of each site, as views."""
    found = []
    for start, site in zip(_starts(sites), sites, strict=False):
        middle, end = start + site.rank * site.inputs, start + site.numel
        a = rows[:, start:middle].unflatten(1, (site.rank, site.inputs))
        found.append((a, rows[:, middle:end].unflatten(1, (site.rank, site.outputs))))
    return found


def _starts(sites: Sequence[Site]) -> list[int]:
    """Returns where each site's numbers begin in those of an adapter, and where the last one's end."""
    return list(accumulate((site.numel for site in sites), initial=0))


def _is_plain(config: Mapping[str, Any]) -> bool:
    others = {name: value for name, value in config.items() if value and name not in _UNDERSTOOD}
    return (
        config.get("peft_type") == "LORA"
        and others.pop("bias", "none") == "none"
        and others.pop("init_lora_weights", True) in _WITHOUT_WEIGHTS
        and not others
    )


def _pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """Returns A and B of each layer; None if there are other tensors."""
    names = {key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key}
    keys = {name: [f"{_PREFIX}{name}.lora_{part}.weight" for part in "AB"] for name in names}
    if {key for pair in keys.values() for key in pair} != tensors.keys():
        return None
    return {name: (tensors[a], tensors[b]) for name, (a, b) in keys.items()}


def _fits(layer: nn.Module | None, a: torch.Tensor, b: torch.Tensor) -> bool:
    if not isinstance(layer, nn.Linear):
        return False
    return a.shape[1:] == (layer.in_features,) and b.shape == (layer.out_features, a.shape[0])


def _has_experts(model: Any) -> bool:
    """Whether layers outside attention see tokens without knowing their rows, as experts do."""
    return experts.are_in(model.config)


def _scaling(config: Mapping[str, Any], site: Site) -> float:
    """Returns PEFT's scaling: alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), site.name), config["lora_alpha"])
    return float(alpha / (math.sqrt(site.rank) if config.get("use_rslora") else site.rank))


_PLACES = 16
"""Rows that a stack grows to before adapters displace each other, unless more are computed together."""


class Stack:
    """Adapters of one shape in the rows of one tensor; those computed together are adjacent.

    A product over many adapters reads them in place. Other rows move out only when their place is needed. Kernels that
    look each adapter up need no places: what is never in a product with others stays where it was loaded.
    """

    def __init__(self, sites: tuple[Site, ...], device: torch.device) -> None:
        self.sites = sites
        self.starts = {site.name: (start, site) for start, site in zip(_starts(sites), sites, strict=False)}
        """By name where a site's numbers begin in those of an adapter, and the site."""
        self.is_aligned = _starts(sites)[-1] % 4 == 0
        """Whether each row begins at a multiple of 16 bytes, as every allocation does."""
        self._rows = torch.empty(0, sum(site.numel for site in sites), device=device)
        self._holders: list[Factors | None] = []
        self.version = 0
        """Changes whenever an adapter moves."""

    def row(self, one: Factors) -> torch.Tensor:
        """Returns one adapter where it is: 1 x numbers."""
        if one.flat is not None:
            return one.flat[None]
        place = self._holders.index(one)
        return self._rows[place : place + 1]

    def gather(self, wanted: Sequence[Factors]) -> tuple[torch.Tensor, list[Factors]]:
        """Returns adjacent rows that hold exactly these adapters, and their order."""
        self._grow(len(wanted) - len(self._holders))
        start, others = self._find_window(wanted)
        if others and len(self._holders) < _PLACES:
            # Parts of a batch, such as rows whose prompts are being read, would otherwise displace each other in every
            # pass.
            self._grow(min(others, _PLACES - len(self._holders)))
            start, _ = self._find_window(wanted)
        window = range(start, start + len(wanted))
        free = [place for place in window if self._holders[place] not in wanted]
        outside = [one for one in wanted if one not in self._holders[start : window.stop]]
        for place, one in zip(free, outside, strict=True):
            self._bring(one, place)
        order = [one for one in self._holders[start : window.stop] if one is not None]
        return self._rows[start : window.stop], order

    def _find_window(self, wanted: Sequence[Factors]) -> tuple[int, int]:
        """Finds the window of places with the fewest other adapters and the most of these; returns its start and how
        many others it holds.
        """
        held, many = set(wanted), len(wanted)

        def count(start: int) -> tuple[int, int]:
            window = self._holders[start : start + many]
            others = sum(one is not None and one not in held for one in window)
            return others, -sum(one in held for one in window)

        start = min(range(len(self._holders) - many + 1), key=count)
        return start, count(start)[0]

    def forget(self, one: Factors) -> None:
        """Frees an adapter's memory, or its place in the stack."""
        one.flat = None
        if one in self._holders:
            self._holders[self._holders.index(one)] = None

    def _bring(self, one: Factors, place: int) -> None:
        """Puts an adapter into a place; the adapter there moves to its former place, or out."""
        self.version += 1
        other = self._holders[place]
        at = None if one.flat is not None else self._holders.index(one)
        row = self._rows[at].clone() if at is not None else one.flat
        assert row is not None
        if at is not None:
            self._holders[at] = other
            if other is not None:
                self._rows[at] = self._rows[place]
        elif other is not None:
            other.flat = self._rows[place].clone()
        self._rows[place] = row
        self._holders[place], one.flat = one, None

    def _grow(self, more: int) -> None:
        if more > 0:
            self.version += 1
            self._rows = torch.cat([self._rows, self._rows.new_zeros(more, self._rows.shape[1])])
            self._holders += [None] * more
