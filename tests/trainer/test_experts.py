"""Adapted experts in one function: compared with PEFT's own forward and with the products one by one."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tunery.spec import Lora
from worker.trainer.kernels import experts
from worker.trainer.recipes import lora

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
TOKENS, EXPERTS, CHOSEN = 21, 8, 3


def model_of(rank: int, dtype: torch.dtype = torch.float64, **config: Any) -> PeftModel:
    """Returns an adapted mixture with random adapters of these types, and odd widths."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64, "hidden_size": 40, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "initializer_range": 0.3,
    }  # fmt: skip
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape | config))
    model = lora.with_new_adapters(base, lora.configuration(base, Lora(r=rank, alpha=2 * rank))).to(dtype)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def wrapper_of(model: PeftModel) -> Any:
    return model.model.model.layers[0].mlp.experts


def routed(*never: int) -> tuple[Tensor, Tensor]:
    """Returns experts and weights for each token; experts `never` get none."""
    torch.manual_seed(1)
    scores = torch.rand(TOKENS, EXPERTS, dtype=torch.float64)
    scores[:, list(never)] = 0
    weights, chosen = scores.topk(CHOSEN, dim=-1)
    return chosen, weights


def gradients(wrapper: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns output and all gradients of a wrapper's forward."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    wrapper.zero_grad()
    out = wrapper(x, chosen, weights)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out))
    learnt = {name: p.grad.clone() for name, p in wrapper.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **learnt}


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("never", [(), (0, 4, 7)])
def test_output_and_gradients_are_those_of_peft(rank: int, never: tuple[int, ...]) -> None:
    model = model_of(rank, _experts_implementation="eager")
    x = torch.randn(TOKENS, 40, dtype=torch.float64)
    wanted = gradients(wrapper_of(model), x, *routed(*never))
    assert experts.install(model) == 1
    found = gradients(wrapper_of(model), x, *routed(*never))
    assert len(wanted) == 7
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_without_its_adapter_a_mixture_is_its_base() -> None:
    model, x = model_of(4, _experts_implementation="eager"), torch.randn(TOKENS, 40, dtype=torch.float64)
    base = wrapper_of(model).base_layer.base_layer
    wanted = base(x, *routed())
    experts.install(model)
    with model.disable_adapter():
        torch.testing.assert_close(wrapper_of(model)(x, *routed()), wanted)
    assert not torch.allclose(wrapper_of(model)(x, *routed()), wanted)


def test_a_run_takes_the_function_and_says_how_it_computes() -> None:
    base = Qwen3MoeForCausalLM(model_of(4).get_base_model().config)
    model = lora.prepare(base, Lora(r=4), None)
    assert experts.products(model) == {"path": "one by one", "why": "not on a GPU"}
    assert experts.products(base.lm_head) is None


@pytest.mark.parametrize("change", [{"has_bias": True}, {"is_transposed": True}, {"has_post_expert_norm": True}])
def test_experts_of_another_form_keep_pefts_forward(change: dict[str, bool]) -> None:
    model = model_of(4)
    vars(wrapper_of(model).base_layer.base_layer).update(change)
    assert experts.install(model) == 0
    assert experts.products(model) is None


def products_of(device: str, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns rows by expert, of which the first, a middle and the last have none, and a weight [experts, in, out]."""
    torch.manual_seed(3)
    counts = torch.tensor([0, 5, 1, 0, 9, 17, 3, 0])
    rows = torch.randn(int(counts.sum()), 40, device=device, dtype=torch.bfloat16)
    weight = torch.randn(len(counts), 40, rank, device=device, dtype=torch.bfloat16)
    other = torch.randn(len(rows), rank, device=device, dtype=torch.bfloat16)
    return rows, weight, other, counts.cumsum(0).to(device, torch.int32)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("rank", [8, 48])
def test_grouped_products_are_those_of_each_expert(device: str, rank: int) -> None:
    rows, weight, other, ends = products_of(device, rank)
    for each in (weight, weight.mT.contiguous().mT):
        found, wanted = (experts._product(rows, each, ends, grouped=grouped) for grouped in (True, False))
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    torch.full((2**22,), float("nan"), device=device, dtype=torch.bfloat16)  # freed memory, which a product may get
    found, wanted = (experts._gradient(rows, other, ends, grouped=grouped) for grouped in (True, False))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-1)
    assert not found[[0, 3, 7]].any()


def test_an_expert_without_rows_has_no_gradient_even_if_its_product_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, _, other, ends = products_of("cpu", 8)
    wanted = experts._gradient(rows, other, ends, grouped=False)
    product = torch.nn.functional.grouped_mm

    def unwritten(*args: Any, **kwargs: Any) -> Tensor:  # as a GPU's kernel does, which a CPU's does not
        out = product(*args, **kwargs)
        out[[0, 3, 7]] = float("nan")
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", unwritten)
    found = experts._gradient(rows, other, ends, grouped=True)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-1)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("never", [(), (0, 4, 7)])
def test_a_gpu_computes_the_same_in_bf16(rank: int, never: tuple[int, ...]) -> None:
    model, x = model_of(rank, _experts_implementation="eager"), torch.randn(TOKENS, 40, dtype=torch.float64)
    wanted = gradients(wrapper_of(model), x, *routed(*never))
    experts.install(model)
    wrapper = wrapper_of(model).to("cuda", torch.bfloat16)
    for name, parameter in wrapper.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    assert experts.products(model) == {"path": "grouped"}
    chosen, weights = routed(*never)
    found = gradients(wrapper, x.to("cuda", torch.bfloat16), chosen.cuda(), weights.to("cuda", torch.bfloat16))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        apart = (found[name].cpu().double() - value).norm() / value.norm()
        assert apart < 2e-2, (name, float(apart))


@pytest.mark.gpu
def test_kernels_of_the_rows_compute_their_definitions() -> None:
    torch.manual_seed(4)
    for inner in (24, 768, 1500):
        both, grad = (torch.randn(33, size, device="cuda", dtype=torch.bfloat16) for size in (2 * inner, inner))
        weights = torch.rand(33, device="cuda", dtype=torch.bfloat16)
        wanted = experts._gate_gradient(grad.cpu().double(), both.cpu().double(), weights.cpu().double())
        value = experts._gate(both, weights)
        torch.testing.assert_close(value.cpu().double(), wanted[0], rtol=1e-2, atol=1e-2)
        for found, exact in zip(experts._gate_gradient(grad, both, weights), wanted, strict=True):
            torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-2, atol=5e-2)
    for width in (40, 2048, 3000):
        rows, update = (torch.randn(99, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        places = torch.randperm(99, device="cuda").view(33, 3)
        wanted_sum = (rows.double() + update.double())[places].sum(1)
        found_sum = experts._sum_rows(rows, update, places).double()
        torch.testing.assert_close(found_sum, wanted_sum, rtol=1e-2, atol=1e-2)
