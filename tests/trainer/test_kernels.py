"""Compares values and gradients of every kernel with its definition in float64, on random inputs."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tunery.planning import activations
from worker.trainer import data
from worker.trainer.data import Row
from worker.trainer.kernels import adapters, cross_entropy, decoder, projections
from worker.trainer.objective import Objective


def error(found: Tensor, wanted: Tensor) -> float:
    """Returns the relative error in the Euclidean norm; NaN stays NaN and fails every comparison."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def one_chunk_holds_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK_BYTES", 0)


@pytest.mark.usefixtures("one_chunk_holds_64_rows")
@pytest.mark.parametrize("head_learns", [False, True])
def test_chunked_cross_entropy_has_the_value_and_gradient_of_the_definition(head_learns: bool) -> None:
    hidden, weight = torch.randn(150, 24), torch.randn(97, 24)
    targets = torch.randint(97, (150,))
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    wanted, expected = cross_entropy.plain(exact[0] @ exact[1].t(), targets, 0.01)
    # plain() computes in fp32, as models do; the reference gradient has to be in float64
    (0.01 * functional.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum")).backward()
    hidden.requires_grad_()
    weight.requires_grad_(head_learns)

    loss, correct = cross_entropy.scaled(hidden, weight, targets, 0.01)
    loss.backward()

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert int(correct) == int(expected)
    assert error(hidden.grad, exact[0].grad) < 1e-5  # type: ignore[arg-type]
    assert (weight.grad is not None) == head_learns
    if head_learns:
        assert error(weight.grad, exact[1].grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_chunk_holds_64_rows")
def test_chunked_cross_entropy_without_gradients_gives_the_same_numbers() -> None:
    hidden, weight, targets = torch.randn(150, 24), torch.randn(97, 24), torch.randint(97, (150,))

    with torch.no_grad():
        loss, correct = cross_entropy.scaled(hidden, weight, targets, 1.0)

    wanted, expected = cross_entropy.plain(hidden @ weight.t(), targets, 1.0)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert int(correct) == int(expected)


def lora_layer(base: nn.Linear, dropout: float = 0.0) -> Any:
    """Returns a PEFT LoRA layer with random A and B on `base`."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    adapters.install(layer)
    return layer


def test_adapted_layer_has_the_value_and_gradients_of_the_definition() -> None:
    base = nn.Linear(20, 12, bias=False)
    layer = lora_layer(base)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    x, grad = torch.randn(2, 5, 20, requires_grad=True), torch.randn(2, 5, 12)
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    wanted = projections.plain(exact[0], base.weight.detach().double(), exact[1], exact[2], 2.0)
    wanted.backward(grad.double())

    out = layer(x)
    out.backward(grad)

    assert error(out, wanted) < 1e-5
    for found, reference in zip((x, a, b), exact, strict=True):
        assert error(found.grad, reference.grad) < 1e-5  # type: ignore[arg-type]
    assert base.weight.grad is None


def test_switched_off_adapter_leaves_the_base_exactly() -> None:
    base = nn.Linear(20, 12)
    layer = lora_layer(base)
    x = torch.randn(4, 20)

    layer.enable_adapters(False)

    assert torch.equal(layer(x), functional.linear(x, base.weight, base.bias))


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    base = nn.Linear(20, 12, bias=False)
    layer = lora_layer(base, dropout=0.999999)
    x = torch.randn(4, 20)

    assert error(layer.train()(x), x @ base.weight.t()) < 1e-6
    assert error(layer.eval()(x), x @ base.weight.t()) > 1e-3


def test_four_bit_layer_multiplies_by_its_unpacked_weight() -> None:
    base = bitsandbytes.nn.Linear4bit(
        64, 32, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
    )
    base.load_state_dict({"weight": torch.randn(32, 64)})
    base.to("cpu")
    layer = lora_layer(base)
    dense = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    a, b = (m.default.weight.detach().double() for m in (layer.lora_A, layer.lora_B))
    x = torch.randn(7, 64, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    wanted = projections.plain(exact, dense, a, b, 2.0)
    wanted.sum().backward()

    out = layer(x)
    out.sum().backward()

    assert error(out, wanted) < 1e-5
    assert error(x.grad, exact.grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("nested", [True, False])
def test_four_bit_weight_is_unpacked_straight_into_the_type_of_the_product(nested: bool) -> None:
    """bitsandbytes does the same; with bf16 in between, exported files would differ from the model in memory."""
    base = bitsandbytes.nn.Linear4bit(
        128, 96, bias=False, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32
    )
    base.weight.data = torch.randn(96, 128, dtype=torch.bfloat16)
    base.to("cpu").support_avx512bf16_for_cpu = False

    with torch.no_grad():
        wanted = base(torch.eye(128)).t()

    assert base.weight.quant_state.dtype == torch.bfloat16
    assert error(projections.dense(base), wanted) < 1e-6


def test_model_with_our_forward_computes_what_pefts_own_does(tiny: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    ids = torch.randint(3, 250, (2, 9))

    def run(ours: bool) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).train()
        if ours:
            assert adapters.install(model) == 14
            decoder.install(model)
        logits = model(ids).logits
        logits.square().mean().backward()
        return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (wanted, wanted_grads), (found, found_grads) = run(ours=False), run(ours=True)

    assert error(found, wanted) < 1e-5
    assert found_grads.keys() == wanted_grads.keys()
    for name, grad in found_grads.items():
        assert error(grad, wanted_grads[name]) < 1e-4, name


def block(bias: bool = False) -> list[projections.Layer]:
    """Returns gate, up and down of a feed-forward block, each with an adapter of its own rank and scale."""
    shapes = [(20, 16), (20, 16), (16, 12)]
    return [
        projections.Layer(
            nn.Linear(inner, outer, bias=bias).requires_grad_(False),
            torch.randn(rank, inner, requires_grad=True),
            torch.randn(outer, rank, requires_grad=True),
            scale,
        )
        for rank, scale, (inner, outer) in zip((3, 5, 4), (2.0, 0.5, 1.5), shapes, strict=True)
    ]


def exact_product(x: Tensor, layer: projections.Layer, learnt: list[Tensor]) -> Tensor:
    """Returns a layer's product in float64, and appends the float64 copies of its A and B to `learnt`."""
    a, b = (part.detach().double().requires_grad_() for part in (layer.a, layer.b))
    learnt += [a, b]
    out = projections.plain(x, layer.base.weight.double(), a, b, layer.scale)
    return out if layer.base.bias is None else out + layer.base.bias.double()


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_one_input_have_the_values_and_gradients_of_the_definition(bias: bool) -> None:
    layers = block(bias)[:2]
    x = torch.randn(2, 5, 20, requires_grad=True)
    exact, learnt = x.detach().double().requires_grad_(), []
    wanted = [exact_product(exact, layer, learnt) for layer in layers]
    grads = [torch.randn(2, 5, 16) for _ in layers]
    torch.autograd.backward(wanted, [grad.double() for grad in grads])

    outs = projections.project(x, layers)
    torch.autograd.backward(outs, grads)

    assert all(error(out, reference) < 1e-5 for out, reference in zip(outs, wanted, strict=True))
    found = [x, *(part for layer in layers for part in (layer.a, layer.b))]
    for tensor, reference in zip(found, [exact, *learnt], strict=True):
        assert error(tensor.grad, reference.grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False])
def test_gated_block_has_the_value_and_gradients_of_the_definition(bias: bool) -> None:
    gate, up, down = block(bias)
    x = torch.randn(2, 5, 20, requires_grad=True)
    exact, learnt = x.detach().double().requires_grad_(), []
    inner = functional.silu(exact_product(exact, gate, learnt)) * exact_product(exact, up, learnt)
    wanted = exact_product(inner, down, learnt)
    grad = torch.randn(2, 5, 12)
    wanted.backward(grad.double())

    out = projections.gated(x, gate, up, down)
    out.backward(grad)

    assert error(out, wanted) < 1e-5
    found = [x, *(part for layer in (gate, up, down) for part in (layer.a, layer.b))]
    for tensor, reference in zip(found, [exact, *learnt], strict=True):
        assert error(tensor.grad, reference.grad) < 1e-5  # type: ignore[arg-type]


def test_update_that_is_added_first_rounds_less() -> None:
    """Otherwise bf16 rounds the product with the frozen weight before the update is added, and again after it."""
    layer = block()[2]
    layer.base.bfloat16()
    layer.b.data *= 0.02  # updates are small compared with the frozen product
    x, b = torch.randn(400, 16).bfloat16(), layer.b.detach().bfloat16()
    a = layer.a.detach().bfloat16()
    exact = projections.plain(x.double(), layer.base.weight.double(), a.double(), b.double(), layer.scale)
    added_last = (x @ layer.base.weight.t()).addmm_(x @ a.t(), b.t(), alpha=layer.scale)

    [out] = projections.project(x, [layer])

    assert error(out, exact) < error(added_last, exact)


@pytest.mark.parametrize("adapted", [True, False])
def test_model_may_change_an_adapted_layers_output_in_place(adapted: bool) -> None:
    layer = lora_layer(nn.Linear(20, 12))
    layer.enable_adapters(adapted)
    x = torch.randn(2, 5, 20, requires_grad=True)
    exact = x.detach().requires_grad_()
    (layer(exact) * 3).square().sum().backward()

    layer(x).mul_(3).square().sum().backward()

    assert error(x.grad, exact.grad) < 1e-6  # type: ignore[arg-type]


def test_model_may_change_a_gated_blocks_output_in_place() -> None:
    x = torch.randn(2, 3, 20, requires_grad=True)

    projections.gated(x, *block()).mul_(3).sum().backward()

    assert x.grad is not None


def test_model_that_is_told_the_rows_borders_learns_what_it_learns_from_padded_rows(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert decoder.install(model) == 2
    objective = Objective(model)
    rows = [Row(ids, ids) for ids in (torch.randint(3, 250, (n,)).tolist() for n in (7, 2, 12, 5))]

    def run(borders: bool, pad_to: tuple[int, int] = (1, 1)) -> tuple[float, dict[str, Tensor]]:
        together = [[0, 3], [1], [2]] if borders else [[i] for i in range(4)]
        batch = data.collate(data.singles(rows), together, torch.device("cpu"), pad_to, borders=borders)
        assert (batch.borders is not None) == borders
        model.zero_grad()
        loss, _ = objective(batch, 1.0)
        loss.backward()
        return float(loss.detach()), {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    wanted, wanted_grads = run(borders=False)
    for pad_to in ((1, 1), (32, 128)):
        found, grads = run(borders=True, pad_to=pad_to)
        assert found == pytest.approx(wanted, rel=1e-6)
        for name, grad in grads.items():
            assert error(grad, wanted_grads[name]) < 1e-4, name


@pytest.mark.parametrize("lengths", [(30, 30, 29), (7, 30, 20)], ids=["rectangle", "line"])
def test_window_narrower_than_the_rows_holds_where_borders_are_told(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.make("Mistral", tmp_path / "base"))
    assert model.config.sliding_window == 16
    assert decoder.install(model) == 2
    objective = Objective(model)
    rows = [Row(ids, ids) for ids in (torch.randint(3, 250, (n,)).tolist() for n in lengths)]
    batches = [
        data.collate(data.singles(rows), [[0], [1], [2]], torch.device("cpu"), borders=borders)
        for borders in (False, True)
    ]

    with torch.no_grad():
        wanted, found = (float(objective(batch, 1.0)[0]) for batch in batches)

    assert found == pytest.approx(wanted, rel=1e-5)
