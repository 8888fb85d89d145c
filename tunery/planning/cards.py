"""Known GPU cards: their published figures and a default price."""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card. `tflops`: published peak of dense 16-bit matrix products (bf16 where supported); `gigabytes` of memory;
    `bandwidth` of the memory in GB/s; `price`: default price of an hour in US dollars (rounded, late 2026), which
    operators can override; `usable`: approximate GiB available to a process, after driver and ECC overhead."""

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
"""Where a card has several variants, a device name without a suffix (`A100`) gets the entry without one."""


def find(device: str) -> Card | None:
    """Returns the card of a device name from the driver, such as `NVIDIA A100-SXM4-80GB`; None if unknown or a CPU."""
    name = best_match(device, [card.name for card in CARDS])
    return next((card for card in CARDS if card.name == name), None)


def best_match(device: str, names: Collection[str]) -> str | None:
    """Returns the name whose words all occur in the device's, of several the longest: `A100 40GB` before `A100`."""
    words = _words(device)
    fitting = [name for name in names if _words(name) and _words(name) <= words]
    return max(fitting, key=lambda name: len(_words(name)), default=None)


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9]+", name.lower()) if word}
