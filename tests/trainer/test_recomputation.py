"""Recomputed layers give the same gradients, and really are computed again, with the fast forward passes too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.streamed_base import Streamed
from tunery.spec import Lora
from worker.trainer import paths
from worker.trainer.kernels import decoder, projections
from worker.trainer.kernels.recomputation import Recomputation, is_running
from worker.trainer.loading import RECIPES

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(5))


def model_of(family: str, *, adapted: bool, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIGS[family])
    if adapted:
        model = RECIPES["lora"].prepare(model, Lora(r=4, dropout=dropout), None)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first, which leaves A without a gradient
                nn.init.normal_(parameter)
    else:
        decoder.install(model)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    model(input_ids=IDS, use_cache=False).logits.pow(2).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def counted(calls: list[str], name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(name + (" again" if is_running() else ""))
        return usual(*args, **kwargs)

    return called


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_without_recomputation(family: str, adapted: bool, count: int) -> None:
    model = model_of(family, adapted=adapted)
    wanted = gradients(model)
    Recomputation(model).of(count)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("family", "dropout", "of_attention", "asked"),
    [("llama", 0.0, 0.0, 0), ("llama", 0.5, 0.0, 3), ("llama", 0.0, 0.5, 3), ("gemma3", 0.0, 0.0, 3)],
)
def test_random_state_is_kept_where_a_layer_may_draw(
    family: str, dropout: float, of_attention: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers that run transformers' own code one cannot tell."""
    model, calls = model_of(family, adapted=True, dropout=dropout), 0
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = of_attention
    usual = torch.get_rng_state

    def counting() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return usual()

    Recomputation(model).of(3)
    monkeypatch.setattr(torch, "get_rng_state", counting)
    model(input_ids=IDS, use_cache=False)

    assert calls == asked


def test_dropout_draws_the_same_again() -> None:
    model = model_of("llama", adapted=True, dropout=0.5)
    wanted = gradients(model)
    Recomputation(model).of(3)
    found = gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_first_layers_are_computed_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers wraps the classes' `forward`, which the fast passes replace: nothing would be recomputed."""
    model, calls = model_of(family, adapted=True), list[str]()
    recomputation = Recomputation(model)

    def note(module: Any, *_: Any) -> None:
        calls.append(f"{module.layer_idx} again" if is_running() else "once")

    if family == "gemma3":
        for layer in recomputation.layers:
            layer.self_attn.register_forward_pre_hook(note)
    else:
        usual = decoder._attention
        monkeypatch.setattr(decoder, "_attention", lambda module, *rest: (note(module), usual(module, *rest))[1])
    recomputation.of(2)
    gradients(model)
    assert calls == ["once"] * 3 + ["1 again", "0 again"]


def test_last_product_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputed layer's output is of no use, so neither is the feed-forward block's."""
    model, calls = model_of("llama", adapted=True), list[str]()
    monkeypatch.setattr(projections, "_adapted", counted(calls, "product", projections._adapted))
    gradients(model)
    assert calls == ["product"] * 3 * 7
    calls.clear()
    Recomputation(model).of(2)
    gradients(model)
    assert sorted(set(calls)) == ["product", "product again"]
    assert calls.count("product again") == 2 * 6


def test_forward_passes_are_restored() -> None:
    model = model_of("llama", adapted=True)
    gemma = model_of("gemma3", adapted=False)
    for each in (model, gemma):
        layers = Recomputation(each).layers
        before = [vars(layer).get("forward") for layer in layers]
        recomputation = Recomputation(each)
        recomputation.of(3)
        assert all(vars(layer)["forward"] is not usual for layer, usual in zip(layers, before, strict=True))
        recomputation.of(1)
        assert [vars(layer).get("forward") for layer in layers][1:] == before[1:]
        recomputation.of(0)
        assert [vars(layer).get("forward") for layer in layers] == before


def test_record_still_names_the_kernels_of_recomputed_layers() -> None:
    model = model_of("llama", adapted=True)
    before = paths._modules(model)
    Recomputation(model).of(3)
    assert paths._modules(model) == before
    assert {"kind": "LlamaDecoderLayer", "count": 3, "path": "decoder"} in before


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    model = model_of("llama", adapted=True)
    wanted = model(input_ids=IDS, use_cache=False).logits
    Recomputation(model).of(3)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_inputs_in_the_hosts_memory_come_back(adapted: bool) -> None:
    model = model_of("llama", adapted=adapted).cuda()
    global IDS
    IDS = IDS.cuda()
    wanted = gradients(model)
    recomputation = Recomputation(model)
    for count in (1, 2, 3):
        recomputation.of(count, offload=True)
        for _ in range(3):  # buffers are used again
            found = gradients(model)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    IDS = IDS.cpu()


@pytest.mark.gpu
def test_offloading_frees_the_inputs() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
    decoder.install(model)
    ids = torch.randint(4, 60, (8, 1024), device="cuda")
    peaks, recomputation = [], Recomputation(model)
    for offload in (False, True):
        recomputation.of(12, offload=offload)
        for _ in range(2):
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.model(input_ids=ids, use_cache=False).last_hidden_state.pow(2).mean().backward()
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    one = 8 * 1024 * 512 * 2
    assert peaks[0] - peaks[1] > 7 * one


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_that_wait_on_the_host_give_the_same_gradients(count: int) -> None:
    """What bench.streamed_base measures is the same work."""
    model = model_of("llama", adapted=True)
    wanted, recomputation = gradients(model), Recomputation(model)
    streamed = Streamed(recomputation.layers[:count])
    recomputation.of(3)
    for _ in range(2):  # the first pass leaves layers in the buffers
        found = gradients(model)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    recomputation.of(0)
    streamed.undo()
    found = gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
