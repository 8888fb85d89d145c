"""Frozen products in eight bits: values and gradients against float64 on random inputs, and where they are used."""

from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from worker.trainer.kernels import adapters, fp8, projections

ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not (torch.cuda.is_available() and fp8.available(torch.device("cuda"))), reason="no CUDA device with e4m3"
        ),
    ],
)
EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", ON_GPU])


@pytest.fixture(autouse=True)
def _small_layers_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "LEAST_SIDE", 16)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def adapted(device: str, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], bias: bool = False) -> Any:
    base = nn.Sequential(*[nn.Linear(inner, outer, bias=bias) for inner, outer in shapes]).to(device, dtype)
    config = LoraConfig(r=8, target_modules=[str(i) for i in range(len(shapes))], init_lora_weights=False)
    model = get_peft_model(base, config).to(device)
    adapters.install(model)
    return model.train()


@EACH_DEVICE
@pytest.mark.parametrize("width", [16, 96, 4096, 14336])
def test_rows_are_quantised_by_their_own_largest_number(device: str, width: int) -> None:
    x = torch.randn(33, width, device=device, dtype=torch.bfloat16) * torch.logspace(-3, 3, 33, device=device)[:, None]
    x[5] = 0
    x = x.bfloat16()

    numbers, scales = fp8.quantise_rows(x)

    assert numbers.dtype == torch.float8_e4m3fn
    wanted, wanted_scales = fp8.plain_quantise_rows(x)
    assert error(scales, wanted_scales) < 1e-6
    # A difference in the last bit of the factor may round a number between two codes to the other code.
    assert float((numbers.float() != wanted.float()).float().mean()) < 1e-3
    back = numbers.float() * scales
    assert float((back - x.float()).abs().max(1).values.div(x.float().abs().max(1).values.clamp_min(1e-9)).max()) < 0.04


@EACH_DEVICE
def test_rows_that_are_a_view_are_read_by_their_stride(device: str) -> None:
    wide = torch.randn(7, 200, device=device, dtype=torch.bfloat16)

    numbers, _ = fp8.quantise_rows(wide[:, 40:136])

    assert torch.equal(numbers.float(), fp8.quantise_rows(wide[:, 40:136].contiguous())[0].float())


# The thread of the backward pass has no CUDA context before its own first product.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@EACH_DEVICE
@pytest.mark.parametrize("bias", [False, True])
def test_product_and_gradients_are_those_of_the_quantised_factors(device: str, bias: bool) -> None:
    """Against float64 products of the same quantised numbers, only the rounding of the product remains."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = adapted(device, dtype, ((64, 96),), bias)
    layer = model.base_model.model[0]
    assert adapters.narrow(model) == ["base_model.model.0"]
    x = torch.randn(48, 64, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(48, 96, device=device, dtype=dtype)
    narrow = layer.base_layer.narrow
    a, b = (part.default.weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    lora_hidden = x.detach().double() @ a.t()
    update = layer.scaling["default"] * lora_hidden @ b.t()
    update.backward(grad.double())
    rows = fp8.plain(fp8.plain_quantise_rows(x.detach()), narrow.rows()).double()
    wanted = rows + update.detach() + (layer.base_layer.bias.double() if bias else 0)
    through = fp8.plain(fp8.plain_quantise_rows(grad), narrow.columns()).double()
    wanted_x = through + layer.scaling["default"] * grad.double() @ b.detach() @ a.detach()

    out = model(x)
    out.backward(grad)

    tolerance = 1e-2 if device == "cuda" else 1e-5
    assert error(out.detach(), wanted) < tolerance
    assert error(x.grad, wanted_x) < tolerance  # type: ignore[arg-type]
    assert error(layer.lora_A.default.weight.grad, a.grad) < tolerance  # type: ignore[arg-type]
    assert error(layer.lora_B.default.weight.grad, b.grad) < tolerance  # type: ignore[arg-type]


@EACH_DEVICE
def test_outlier_channels_do_not_drown_the_others(device: str) -> None:
    """A weight row of a thousand times the size has its own scale, so the products of the others stay accurate."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = nn.Linear(64, 96, bias=False, device=device, dtype=dtype)
    weight = layer.weight.data
    weight.normal_()[3] *= 1000
    x = torch.randn(48, 64, device=device, dtype=dtype)
    packed = fp8.pack(layer)
    assert packed is not None

    found = fp8.product(fp8.quantise_rows(x), packed.rows(), dtype)

    wanted = x.double() @ weight.double().t()
    others = [i for i in range(96) if i != 3]
    assert error(found[:, others], wanted[:, others]) < 0.05
    assert error(found[:, 3], wanted[:, 3]) < 0.06


def in_four_bits(device: str, shape: tuple[int, int], *, nested: bool, quant_type: str = "nf4") -> Any:
    """Returns a Linear4bit [out, in] with a random weight whose rows differ in scale."""
    layer = bitsandbytes.nn.Linear4bit(
        *reversed(shape), bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type=quant_type
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None], requires_grad=False,
        compress_statistics=nested, quant_type=quant_type,
    )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    return layer.to(device)


@EACH_DEVICE
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (64, 192), (208, 128)])
def test_four_bits_are_unpacked_to_the_numbers_that_their_wide_weight_is_quantised_to(
    device: str, nested: bool, shape: tuple[int, int]
) -> None:
    layer = in_four_bits(device, shape, nested=nested)
    packed = fp8.pack(layer)
    assert isinstance(packed, fp8.Unpacked)
    wide = fp8._numbers(layer.weight.detach(), layer.weight.quant_state)

    for (numbers, scales), wanted in ((packed.rows(), wide), (packed.columns(), wide.t())):
        by_rows, row_scales = fp8.plain_quantise_rows(wanted)
        assert error(scales.view(-1, 1), row_scales) < 1e-6
        assert numbers.shape == wanted.shape
        # A difference in the last bit of the quotient may round a number between two codes to the other code.
        assert float((numbers.float() != by_rows.float()).float().mean()) < 5e-3
        assert error(numbers.float() * scales.view(-1, 1), wanted) < 0.04


@EACH_DEVICE
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_four_bits_multiply_as_the_weight_that_they_stand_for_does(device: str) -> None:
    layer = in_four_bits(device, (96, 64), nested=True)
    weight = projections.dense(layer).double()
    a, b = torch.randn(8, 64, device=device) / 8, torch.randn(96, 8, device=device) / 8
    x = torch.randn(48, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(48, 96, device=device, dtype=torch.bfloat16)

    [out] = projections.project(x, [projections.Layer(layer, a, b, 2.0, fp8.pack(layer))])
    out.backward(grad)

    delta = 2.0 * b.double() @ a.double()
    assert error(out.detach(), x.detach().double() @ (weight + delta).t()) < 0.05
    assert error(x.grad, grad.double() @ (weight + delta)) < 0.05  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "quant_type"), [((96, 64), "fp4"), ((96, 96), "nf4"), ((8, 64), "nf4")])
def test_other_four_bits_stay_as_they_are(shape: tuple[int, int], quant_type: str) -> None:
    """Another code book, rows that end within a block, and a side that the hardware cannot multiply stay in 4 bits."""
    assert fp8.pack(in_four_bits("cpu", shape, nested=True, quant_type=quant_type)) is None


@EACH_DEVICE
def test_gradients_of_adapters_point_where_those_of_the_wide_weight_do(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = adapted(device, dtype, ((64, 96), (96, 64), (64, 32)))
    x = torch.randn(256, 64, device=device, dtype=dtype)
    grads = []
    for narrowed in (False, True):
        if narrowed:
            assert len(adapters.narrow(model)) == 3
        model.zero_grad()
        model(x).float().square().mean().backward()
        grads.append({name: p.grad.double().flatten() for name, p in model.named_parameters() if p.grad is not None})

    for name, wide in grads[0].items():
        found = grads[1][name]
        assert float(torch.dot(found, wide) / (found.norm() * wide.norm())) >= 0.99, name
        assert 0.98 <= float(found.norm() / wide.norm()) <= 1.02, name


def test_answers_are_given_with_the_weight_as_it_is() -> None:
    model = adapted("cpu", torch.float32, ((64, 96),))
    x = torch.randn(5, 64)
    wanted, in_training = model.eval()(x), model.train()(x)
    adapters.narrow(model)

    assert torch.equal(model.eval()(x), wanted)
    assert 1e-4 < error(model.train()(x).detach(), in_training.detach()) < 0.1


def test_layers_whose_sides_the_product_does_not_take_stay_as_they_are() -> None:
    model = adapted("cpu", torch.float32, ((64, 40), (40, 64)))

    assert adapters.narrow(model) == []


def test_layers_that_are_too_small_to_gain_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "LEAST_SIDE", 96)

    assert adapters.narrow(adapted("cpu", torch.float32, ((64, 96), (96, 96)))) == ["base_model.model.1"]


def test_layers_that_are_given_up_multiply_with_the_weight_as_it_is() -> None:
    model = adapted("cpu", torch.float32, ((64, 96), (96, 64)))
    x = torch.randn(5, 64)
    wanted = model(x)
    [first, second] = adapters.narrow(model)

    adapters.widen(model, [first])
    one = model(x)
    adapters.widen(model, [second])

    assert not torch.equal(one, wanted)
    assert torch.equal(model(x), wanted)


@EACH_DEVICE
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_watch_compares_both_directions_of_every_kind_of_product(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = adapted(device, dtype, ((64, 96), (96, 64)))
    model.base_model.model[1].lora_dropout["default"] = nn.Dropout(0.5)  # so its frozen product is computed alone
    first, second = (model.base_model.model[i].base_layer for i in (0, 1))
    adapters.narrow(model)
    x = torch.randn(48, 64, device=device, dtype=dtype, requires_grad=True)

    with fp8.watched() as watch:
        model(x).float().square().sum().backward()
    model(x)

    assert set(watch.found) == {(layer, way) for layer in (first, second) for way in ("forward", "gradient")}
    for cosine, ratio in watch.found.values():
        assert 0.998 < cosine < 0.99999
        assert ratio == pytest.approx(1, abs=0.01)
    assert fp8.watch() is None


@pytest.mark.parametrize("part", [7, 1000], ids=["in parts", "at once"])
def test_products_are_compared_by_cosine_and_norm(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_PART", part)
    watch, layer = fp8.Watch(), object()
    one, other = (torch.randn(5, 9) for _ in range(2))
    watch.compare(layer, "forward", one, other)
    watch.compare(layer, "gradient", one, torch.zeros(5, 9))

    cosine = float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))
    assert watch.found == {(layer, "forward"): pytest.approx((cosine, float(one.norm() / other.norm())), rel=1e-5)}


def test_frozen_product_beside_dropout_is_narrow_too() -> None:
    model = adapted("cpu", torch.float32, ((64, 96),))
    layer = model.base_model.model[0]
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    layer.lora_B.default.weight.data.zero_()
    x = torch.randn(5, 64, requires_grad=True)
    adapters.narrow(model)
    narrow = layer.base_layer.narrow

    out = model(x)
    out.sum().backward()

    rows = fp8.plain_quantise_rows(x.detach())
    assert error(out.detach(), fp8.plain(rows, narrow.rows())) < 1e-5
    ones = fp8.plain_quantise_rows(torch.ones_like(out))
    assert error(x.grad, fp8.plain(ones, narrow.columns())) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "supported"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_only_cards_that_multiply_e4m3_use_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], supported: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    assert fp8.available(torch.device("cuda")) is supported
