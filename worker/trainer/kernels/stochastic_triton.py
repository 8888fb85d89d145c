"""The Triton kernel behind `stochastic.add`: one pass over weight and update."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.trainer.kernels.stochastic import BLOCK, LANE


def add(weight: Tensor, update: Tensor, keep: float, seed: int, first: int = 0) -> None:
    """Does the same as `stochastic.add`, on flat contiguous CUDA tensors."""
    count = weight.numel()
    with torch.cuda.device_of(weight):
        _add[(triton.cdiv(count, BLOCK),)](weight, update, count, keep, seed, first // 8, LANE=LANE, num_warps=4)


# Triton compiles a second version for values that 16 divides. That is no use for the seed and the counter, but it is
# for the count, as loads are wide only if the mask's end is known to be aligned.
@triton.jit(do_not_specialize=["keep", "seed", "first_counter"])  # type: ignore[untyped-decorator]
def _add(weight, update, count, keep, seed, first_counter, LANE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803 (Triton's spelling)
    column = tl.arange(0, LANE)
    counter = first_counter + tl.program_id(0) * LANE + column
    words = tl.randint4x(seed, counter)
    start = tl.program_id(0).to(tl.int64) * (8 * LANE)
    for half in tl.static_range(2):
        for word in tl.static_range(4):
            place = start + (half * 4 + word) * LANE + column
            inside = place < count
            exact = tl.load(weight + place, inside, 0.0).to(tl.float32) * keep
            exact += tl.load(update + place, inside, 0.0).to(tl.float32)
            noise = (words[word] >> (16 * half)) & 0xFFFF
            bits = exact.to(tl.uint32, bitcast=True) + noise.to(tl.uint32, bitcast=True)
            tl.store(weight + place, (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16), inside)
            tl.store(update + place, tl.zeros_like(exact).to(tl.bfloat16), inside)
