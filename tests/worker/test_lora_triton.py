"""Compares the server's Triton kernels with their definition in float64: `pytest -m gpu --noconftest`."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run these on a host with a GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_aligned", [False, True])
@pytest.mark.parametrize("rounds_twice", [False, True])
@pytest.mark.parametrize(
    ("rank", "inputs", "outputs"), [(1, 8, 8), (8, 576, 192), (16, 4096, 14336), (12, 1000, 333), (64, 2048, 1024)]
)
def test_each_row_gets_its_own_adapter(
    dtype: torch.dtype, rounds_twice: bool, is_aligned: bool, rank: int, inputs: int, outputs: int
) -> None:
    from worker.server import lora_triton

    chosen = [2, -1, 0, 2, 1]
    # The numbers of an adapter's other layers lie around those of this one.
    start, numbers = 8, rank * (inputs + outputs)
    adapters = [torch.randn(numbers + 24, device="cuda") for _ in range(3)]
    a = [one[start : start + rank * inputs].view(rank, inputs).T for one in adapters]
    b = [one[start + rank * inputs : start + numbers].view(rank, outputs) for one in adapters]
    addresses = torch.tensor([0 if i < 0 else adapters[i].data_ptr() for i in chosen], device="cuda")
    x = torch.randn(len(chosen), 1, inputs, device="cuda", dtype=dtype)
    out = torch.randn(len(chosen), 1, outputs, device="cuda", dtype=dtype)
    before, guards = out.clone(), [one.clone() for one in adapters]

    lora_triton.add(
        x, addresses, out,
        start=start, rank=rank, inputs=inputs, outputs=outputs, is_aligned=is_aligned, rounds_twice=rounds_twice,
    )  # fmt: skip

    for row, adapter in enumerate(chosen):
        wanted = before[row].double()
        if adapter >= 0:
            delta = x[row].double() @ a[adapter].double() @ b[adapter].double()
            wanted = wanted + (delta.to(dtype).double() if rounds_twice else delta)
        difference = float((out[row].double() - wanted).norm() / wanted.norm())
        assert difference < (4e-3 if dtype == torch.bfloat16 else 1e-5), (row, difference)
    assert torch.equal(out[1], before[1])
    assert all(map(torch.equal, adapters, guards))


def test_adapters_that_begin_between_sixteen_bytes_are_read_number_by_number() -> None:
    from worker.server import lora_triton

    numbers = torch.randn(1 + 8 * (64 + 32), device="cuda")
    a, b = numbers[1 : 1 + 8 * 64].view(8, 64).T, numbers[1 + 8 * 64 :].view(8, 32)
    address = torch.tensor([numbers.data_ptr() + 4], device="cuda")
    x, out = torch.randn(1, 1, 64, device="cuda"), torch.zeros(1, 1, 32, device="cuda")
    lora_triton.add(x, address, out, start=0, rank=8, inputs=64, outputs=32, is_aligned=False, rounds_twice=False)
    torch.testing.assert_close(out[0, 0], x[0, 0] @ a @ b)
