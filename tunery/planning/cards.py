"""Known cards: what their makers publish of them, and a price to begin with."""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card. `tflops`: published, dense matrix products in 16 bits (bf16 where it has them); `gigabytes` of memory;
    `bandwidth` of it in GB/s; `price` of an hour in US dollars, a round figure of late 2026 that operators replace;
    `usable`: GiB that a process finds there, about, as drivers and error correction take some."""

    name: str
    tflops: float
    gigabytes: int
    bandwidth: int
    price: float
    usable: float


CARDS = (
    Card("T4", 65, 16, 320, 0.5, 14.6),
    Card("A10G", 70, 24, 600, 1.5, 22.0),
    Card("A10", 125, 24, 600, 1.0, 22.0),
    Card("L4", 121, 24, 300, 0.8, 22.0),
    Card("RTX 3090", 71, 24, 936, 0.4, 23.6),
    Card("RTX 4090", 165, 24, 1008, 0.6, 23.5),
    Card("A40", 150, 48, 696, 0.8, 44.4),
    Card("A6000", 155, 48, 768, 0.8, 47.4),
    Card("L40S", 362, 48, 864, 1.5, 44.4),
    Card("A100 40GB", 312, 40, 1555, 2.0, 39.4),
    Card("A100", 312, 80, 1935, 3.0, 79.2),
    Card("H100 PCIe", 756, 80, 2039, 3.5, 79.1),
    Card("H100", 989, 80, 3350, 4.0, 79.1),
    Card("H200", 989, 141, 4800, 4.5, 139.8),
    Card("B200", 2250, 180, 7700, 7.0, 178.0),
)
"""Of several forms of a card, the one that stands without an addition is meant where a device names none."""


def find(device: str) -> Card | None:
    """The card that a driver's name of a device names, as `NVIDIA A100-SXM4-80GB`; None for others and for a CPU."""
    name = best_match(device, [card.name for card in CARDS])
    return next((card for card in CARDS if card.name == name), None)


def best_match(device: str, names: Collection[str]) -> str | None:
    """The name whose words the device's name all has, of several the one with the most: `A100 40GB` before `A100`."""
    words = _words(device)
    fitting = [name for name in names if _words(name) and _words(name) <= words]
    return max(fitting, key=lambda name: len(_words(name)), default=None)


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9]+", name.lower()) if word}
