"""AdamW with 8-bit moments on bf16 weights: its definition, and whether a device's kernel computes the same.

Dettmers et al. 2021 (arXiv:2110.02861): a moment is a code of 256 numbers times a scale for each block of 256 elements.
The weight is rounded stochastically.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from torch.nn import functional

from worker.trainer import pieces
from worker.trainer.kernels import stochastic

log = logging.getLogger(__name__)

QUANTISED = pieces.BLOCK
"""Elements that share a scale."""
_LEAST = 1e-37
_COMPARED = 3 * stochastic.BLOCK + 300
"""Elements on which a kernel is compared with the definition, with blocks that are not full at the end."""
_RARELY = 0.01
"""Fraction of codes and weights whose last digit may differ: sums are rounded differently where products are fused."""
Kernel = Callable[[Tensor, Tensor, list[Tensor], int, dict[str, Any], int, int], None]


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the codes' numbers [256] of the first and of the second moment, in ascending order."""
    signed, unsigned = (bitsandbytes.functional.create_dynamic_map(signed=signed) for signed in (True, False))
    return signed.to(device), unsigned.to(device)


def plain(
    weight: Tensor, grad: Tensor, moments: list[Tensor], number: int, group: dict[str, Any], seed: int, first: int
) -> None:
    """Does step `number`, from 1, on a flat bf16 weight and its moments: both's codes, then both's scales.

    `seed` and `first`: as in `stochastic.add`.
    """
    code1, code2, scale1, scale2 = moments
    (beta1, beta2), (signed, unsigned), count = group["betas"], tables(weight.device), weight.numel()
    moment1 = beta1 * _numbers(code1, scale1, signed) + (1 - beta1) * grad.float()
    moment2 = beta2 * _numbers(code2, scale2, unsigned) + (1 - beta2) * grad.float() ** 2
    root = (1 - beta2**number) ** 0.5
    step = group["lr"] * root / (1 - beta1**number) * (moment1 / (moment2.sqrt() + group["eps"] * root))
    exact = weight.float() * (1 - group["lr"] * group["weight_decay"]) - step
    weight.copy_(stochastic.rounded(exact, stochastic.noise(seed, first, count, weight.device)))
    _quantise(moment1, code1, scale1, signed)
    _quantise(moment2, code2, scale2, unsigned)


def _numbers(code: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    return table[code.int()] * scale.repeat_interleave(QUANTISED)[: code.numel()]


def _quantise(moment: Tensor, code: Tensor, scale: Tensor, table: Tensor) -> None:
    """Sets the scales and the codes whose numbers are nearest; as in bitsandbytes a small negative one is not 0."""
    blocks = functional.pad(moment, (0, -moment.numel() % QUANTISED)).view(-1, QUANTISED)
    scale.copy_(blocks.abs().amax(1))
    parts = (blocks / scale.clamp_min(_LEAST)[:, None]).view(-1)[: moment.numel()]
    nearest = torch.bucketize(parts, (table[1:] + table[:-1]) / 2)
    code.copy_(torch.where((parts < 0) & (table[nearest] == 0), nearest - 1, nearest))


@cache
def agrees(device: torch.device) -> bool:
    """Whether the Triton kernel computes `plain` on a CUDA device. A warning says so if it does not."""
    try:
        from worker.trainer.kernels import adamw_triton  # without a GPU there is no Triton

        found = computes_the_definition(adamw_triton.step, device)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        log.warning("the optimizer's own kernel does not run on this device", exc_info=True)
        return False
    if not found:
        log.warning("the optimizer's own kernel is wrong on this device: bitsandbytes' kernel is used")
    return found


def computes_the_definition(kernel: Kernel, device: torch.device) -> bool:
    """Whether two steps of a kernel are those of `plain` from the same state, on random numbers that never change."""
    drawn = torch.Generator().manual_seed(0)  # no other random numbers of a run change
    weight = (torch.randn(_COMPARED, generator=drawn) * 0.04).bfloat16().to(device)
    blocks = -(-_COMPARED // QUANTISED)
    moments = [torch.zeros(_COMPARED, dtype=torch.uint8, device=device) for _ in range(2)]
    moments += [torch.zeros(blocks, device=device) for _ in range(2)]
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    for number in (1, 2):
        spread = torch.rand(_COMPARED, generator=drawn) ** 4
        grad = (torch.randn(_COMPARED, generator=drawn) * spread * 1e-3).bfloat16().to(device)
        seed = stochastic.seed_of(0, number, "compared")
        found_weight, found = weight.clone(), [part.clone() for part in moments]
        kernel(found_weight, grad, found, number, group, seed, stochastic.BLOCK)
        plain(weight, grad, moments, number, group, seed, stochastic.BLOCK)
        if not _alike(found_weight, found, weight, moments):
            return False
    return True


def _alike(weight: Tensor, moments: list[Tensor], wanted_weight: Tensor, wanted: list[Tensor]) -> bool:
    pairs = [(weight, wanted_weight), *zip(moments[:2], wanted[:2], strict=True)]
    rare = all(float((one != other).float().mean()) <= _RARELY for one, other in pairs)
    near = torch.allclose(weight.float(), wanted_weight.float(), rtol=2**-7, atol=1e-4)
    scales = all(torch.allclose(*pair, rtol=1e-3, atol=0) for pair in zip(moments[2:], wanted[2:], strict=True))
    return rare and near and scales
