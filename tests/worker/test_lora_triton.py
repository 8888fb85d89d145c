"""Compares the server's Triton kernels with their definition in float64: `pytest -m gpu --noconftest`."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run these on a host with a GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounds_twice", [False, True])
@pytest.mark.parametrize(
    ("rank", "inputs", "outputs"), [(1, 8, 8), (8, 576, 192), (16, 4096, 14336), (12, 1000, 333), (64, 2048, 1024)]
)
def test_each_row_gets_its_own_adapter(
    dtype: torch.dtype, rounds_twice: bool, rank: int, inputs: int, outputs: int
) -> None:
    from worker.server import lora_triton

    chosen = [2, -1, 0, 2, 1]
    # As in a stack: the numbers of an adapter's other layers lie between those of two adapters.
    rows = torch.randn(3, rank * (inputs + outputs) + 24, device="cuda")
    a = rows[:, 8 : 8 + rank * inputs].unflatten(1, (rank, inputs)).transpose(1, 2)
    b = rows[:, 16 + rank * inputs : 16 + rank * (inputs + outputs)].unflatten(1, (rank, outputs))
    x = torch.randn(len(chosen), 1, inputs, device="cuda", dtype=dtype)
    out = torch.randn(len(chosen), 1, outputs, device="cuda", dtype=dtype)
    before, guard = out.clone(), rows.clone()

    lora_triton.add(x, a, b, torch.tensor(chosen, dtype=torch.int32, device="cuda"), out, rounds_twice=rounds_twice)

    for row, adapter in enumerate(chosen):
        wanted = before[row].double()
        if adapter >= 0:
            delta = x[row].double() @ a[adapter].double() @ b[adapter].double()
            wanted = wanted + (delta.to(dtype).double() if rounds_twice else delta)
        difference = float((out[row].double() - wanted).norm() / wanted.norm())
        assert difference < (4e-3 if dtype == torch.bfloat16 else 1e-5), (row, difference)
    assert torch.equal(out[1], before[1])
    assert torch.equal(rows, guard)
