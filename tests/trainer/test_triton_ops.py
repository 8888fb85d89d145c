"""Compares every Triton kernel with its definition in float64, on random inputs and odd shapes: `pytest -m gpu`."""

from itertools import accumulate, pairwise

import bitsandbytes
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.trainer.kernels import adamw, attention, cached_attention, cross_entropy, elementwise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run these on a host with a GPU"),
]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def same(found: Tensor | None, wanted: Tensor | None, tolerance: float = 6e-3) -> None:
    assert found is not None
    assert wanted is not None
    error = float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())
    assert error <= tolerance, error


@pytest.mark.parametrize("width", [64, 576, 2048, 4096, 5120])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_norm_of_a_sum(width: int, learns: bool, adds: bool) -> None:
    x, residual = drawn(3, 37, width), drawn(3, 37, width) if adds else None
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16, requires_grad=learns)
    inputs = [x, weight] if residual is None else [x, weight, residual]
    copies = exact(*inputs)
    total = copies[0] + copies[2] if adds else copies[0]
    # The sum is rounded before it is normalised, as in the model.
    rounded = total + (total.detach().bfloat16().double() - total.detach())
    wanted = rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + 1e-5) * copies[1]
    grad, grad_total = (torch.randn(3, 37, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.autograd.backward([wanted, total * 1.0], [grad.double(), grad_total.double()])

    out, found_total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
    torch.autograd.backward([out, found_total * 1.0], [grad, grad_total])

    same(out, wanted)
    same(found_total, total)
    for tensor, reference in zip(inputs, copies, strict=True):
        if tensor.requires_grad:
            same(tensor.grad, reference.grad)


@pytest.mark.parametrize(("heads", "width"), [(32, 128), (8, 128), (9, 64), (5, 96), (3, 16)])
@pytest.mark.parametrize("batch_of_angles", [1, 2])
def test_rotation(heads: int, width: int, batch_of_angles: int) -> None:
    x = drawn(2, 33, heads * width)
    angles = torch.rand(batch_of_angles, 33, width // 2, device="cuda") * 6
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    [copy] = exact(x)
    wanted = elementwise.plain_rotate(copy.view(2, 33, heads, width), cos.double(), sin.double())
    grad = torch.randn(2, heads, 33, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    wanted.backward(grad.double())

    out = elementwise.rotate(x.view(2, 33, heads, width), cos, sin)
    out.backward(grad)

    same(out, wanted)
    same(x.grad, copy.grad)


@pytest.mark.parametrize("shape", [(2, 33, 1536), (1, 1, 7), (4, 512, 11008)])
def test_gated_activation(shape: tuple[int, ...]) -> None:
    gate, up = drawn(*shape), drawn(*shape)
    copies = exact(gate, up)
    wanted = elementwise.plain_swiglu(*copies)
    grad = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    wanted.backward(grad.double())

    out = elementwise.swiglu(gate, up)
    out.backward(grad)

    same(out, wanted)
    same(gate.grad, copies[0].grad)
    same(up.grad, copies[1].grad)


@pytest.mark.parametrize("vocabulary", [97, 4096, 32000, 128256])
@pytest.mark.parametrize("head_learns", [True, False])
def test_cross_entropy_of_a_head(vocabulary: int, head_learns: bool) -> None:
    hidden = drawn(300, 64)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16, requires_grad=head_learns)
    targets = torch.randint(vocabulary, (300,), device="cuda")
    targets[::7] = -100
    copies = exact(hidden, weight)
    # The logits are rounded to bf16 before the loss, as a model's own are.
    logits = copies[0] @ copies[1].t()
    logits = logits + (logits.detach().bfloat16().double() - logits.detach())
    wanted = functional.cross_entropy(logits, targets, reduction="sum") * 0.25
    wanted.backward()

    loss, correct = cross_entropy.scaled(hidden, weight, targets, 0.25)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    expected = (((hidden @ weight.t()).float().argmax(-1) == targets) & (targets >= 0)).sum()
    assert abs(int(correct) - int(expected)) <= 1
    same(hidden.grad, copies[0].grad, 1e-2)
    if head_learns:
        same(weight.grad, copies[1].grad, 1e-2)


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (256, 576), (96, 64)])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_four_bits_are_unpacked_to_the_bit_as_bitsandbytes_does(
    shape: tuple[int, int], nested: bool, dtype: torch.dtype
) -> None:
    from worker.trainer.kernels import triton_ops

    weight = torch.randn(shape, device="cuda", dtype=dtype) * torch.rand(shape[0], 1, device="cuda", dtype=dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)

    found = triton_ops.unpack_nf4(packed, state)

    assert torch.equal(found, bitsandbytes.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize(("heads", "fewer", "width"), [(8, 2, 128), (9, 3, 64), (4, 4, 32), (4, 4, 96)])
def test_rows_attend_to_themselves_alone(heads: int, fewer: int, width: int, window: int | None) -> None:
    lengths = [70, 1, 300, 33]
    ends = [sum(lengths[:i]) for i in range(5)]
    assert [end - start for start, end in pairwise(ends)] == lengths
    # Two rows without tokens pad the number of rows.
    borders = attention.Borders(torch.tensor([*ends, ends[-1], ends[-1]], dtype=torch.int32, device="cuda"), 512)
    if not attention.available(width, window):
        pytest.skip("this torch has no variable-length attention with a window")
    query, key, value = drawn(404, heads, width), drawn(404, fewer, width), drawn(404, fewer, width)
    copies = exact(query, key, value)
    wanted = attention.plain(*copies, borders, width**-0.5, window)
    grad = torch.randn(404, heads, width, device="cuda", dtype=torch.bfloat16)
    wanted.backward(grad.double())

    out = attention.rows_apart(query, key, value, borders, width**-0.5, window)
    out.backward(grad)

    same(out, wanted)
    for tensor, reference in zip((query, key, value), copies, strict=True):
        same(tensor.grad, reference.grad, 1e-2)


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_own_kernels_take_any_number_of_rows(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_kernel", lambda: None)  # torch's, which must not be needed
    lengths = [(5 * number) % 67 for number in range(count - 1)] + [700]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    both = drawn(sum(lengths), 10, 64)
    query, key, value = both.split([6, 2, 2], 1)  # not contiguous, as of a projection of all three
    copies = exact(query, key, value)
    wanted = attention.plain(*copies, attention.Borders(ends, max(lengths)), 0.125, None)
    grad = torch.randn_like(query)
    references = torch.autograd.grad(wanted, copies, grad.double())

    passes = []
    for _ in range(2):
        out = attention.rows_apart(query, key, value, attention.Borders(ends, max(lengths)), 0.125, None)
        passes.append([out, *torch.autograd.grad(out, (query, key, value), grad)])

    for found, again, reference in zip(*passes, [wanted, *references], strict=True):
        same(found, reference, 1e-2)
        assert torch.equal(found, again)


def test_adamw_in_one_pass() -> None:
    assert adamw.agrees(torch.device("cuda"))


@pytest.mark.parametrize(("heads", "key_heads"), [(32, 32), (32, 8), (9, 3), (6, 1), (1, 1)])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize(("rows", "window"), [(2, None), (2, 100), (70, None), (70, 7)])
def test_attention_of_a_token_over_its_own_positions(
    heads: int, key_heads: int, width: int, rows: int, window: int | None
) -> None:
    """Also where the other positions, and those of other slots, hold NaN; of few rows, in several parts."""
    positions = 600
    lengths = torch.randint(1, positions + 1, (rows,), device="cuda")
    lengths[:2] = torch.tensor([1, positions])
    query = torch.randn(rows, heads, width, dtype=torch.bfloat16, device="cuda")
    cache = torch.randn(2, rows + 2, key_heads, positions + 40, width, dtype=torch.bfloat16, device="cuda")
    keys, values = cache[:, 1:-1, :, :positions]
    wanted = cached_attention.plain(query.double(), keys.double(), values.double(), lengths, 0.1, window)
    own = torch.arange(positions, device="cuda") < lengths[:, None]
    for part in (keys, values):
        part.masked_fill_(~own[:, None, :, None], torch.nan)
    cache[:, 0], cache[:, -1], cache[..., positions:, :] = torch.nan, torch.nan, torch.nan
    same(cached_attention.attend(query, keys, values, lengths, 0.1, window), wanted)


def test_attention_over_the_cache_is_recorded_with_lengths_that_change() -> None:
    query, keys = (torch.randn(4, *shape, dtype=torch.bfloat16, device="cuda") for shape in ((8, 64), (2, 900, 64)))
    lengths = torch.full((4,), 3, device="cuda")
    cached_attention.attend(query, keys, keys, lengths, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cached_attention.attend(query, keys, keys, lengths, 0.1)
    for length in (1, 500, 900):
        lengths.fill_(length)
        graph.replay()
        same(found, cached_attention.plain(query, keys, keys, lengths, 0.1))
