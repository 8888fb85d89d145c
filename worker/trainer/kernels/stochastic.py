"""Adds an update to bf16 weights with stochastic rounding.

bf16 has 8 significant bits: a weight of 0.04 has neighbours 2.4e-4 away, so an update of 2e-5, rounded to nearest, is
lost at every step. Rounded up or down at random, in proportion to the distance, it is right on average.

The random bits are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with `seed` as the
key and the element's index as the counter: the same on every rank, after a resume, and however a tensor is split into
chunks. One block of 128 bits serves eight elements, `LANE` apart. `plain` is the reference; on a GPU a Triton kernel
does the same in one pass, bit for bit if `keep` is 1.
"""

import hashlib

import torch
from torch import Tensor

LANE = 1024
BLOCK = 8 * LANE
"""Elements that one row of counters serves; chunks begin at multiples of it."""
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_DROPPED = 16
"""Bits of a float32 that a bfloat16 lacks."""


def seed_of(seed: int, step: int, name: str) -> int:
    """Returns the key of a tensor's rounding in a step, at least 2**62, so that Triton always treats it as an int64."""
    digest = hashlib.blake2b(f"{seed}:{step}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2 | 1 << 62


def add(weight: Tensor, update: Tensor, keep: float, seed: int, first: int = 0) -> None:
    """Sets `weight` to `keep * weight + update`, rounded stochastically, and `update` to zero for the next step.

    Both are flat bf16 tensors of equal length; `first` is the index of their first element in the whole tensor, a
    multiple of `BLOCK`.
    """
    if weight.is_cuda:
        from worker.trainer.kernels import stochastic_triton  # without a GPU there is no Triton

        stochastic_triton.add(weight, update, keep, seed, first)
    else:
        plain(weight, update, keep, seed, first)


def plain(weight: Tensor, update: Tensor, keep: float, seed: int, first: int = 0) -> None:
    """Computes `add` by its definition."""
    exact = weight.float() * keep + update.float()
    weight.copy_(rounded(exact, noise(seed, first, weight.numel(), weight.device)))
    update.zero_()


def rounded(exact: Tensor, noise: Tensor) -> Tensor:
    """Rounds fp32 to bf16, up with the probability (dropped bits) / 2**16. `noise`: int32 in [0, 2**16).

    Added to a float's bits, the noise carries into the kept bits exactly that often, including the exponent.
    """
    return (exact.view(torch.int32) + noise >> _DROPPED << _DROPPED).view(torch.float32).bfloat16()


def noise(seed: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """Returns 16 random bits for each of `count` elements from index `first`, as int32."""
    rows = -(-count // BLOCK)
    counters = torch.arange(first // 8, first // 8 + rows * LANE, device=device)
    words = _philox(counters, seed)
    halves = [word & 0xFFFF for word in words] + [word >> 16 for word in words]
    lanes = torch.stack([half.view(rows, LANE) for half in halves], 1)
    return lanes.reshape(-1)[:count].int()


def _philox(counters: Tensor, seed: int) -> list[Tensor]:
    """Returns four words of 32 random bits for each counter, in int64, whose overflow keeps the product's lower 64
    bits.
    """
    zero = torch.zeros_like(counters)
    a, b, c, d = counters, zero, zero, zero
    first_key, second_key = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (right >> 32 & _LOW) ^ b ^ first_key, right & _LOW
        c, d = (left >> 32 & _LOW) ^ d ^ second_key, left & _LOW
        first_key, second_key = first_key + _KEY_STEPS[0] & _LOW, second_key + _KEY_STEPS[1] & _LOW
    return [a, b, c, d]
