"""Which input embeddings may be in the host's memory; test_gpu.py looks them up there."""

from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from worker.trainer import embeddings

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def model_of(*, tied: bool = False) -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**_SIZES, tie_word_embeddings=tied))


def adapted(model: Any, **options: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **options)).get_base_model()


def movable(causal: Any) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in embeddings._movable(causal)]


def test_frozen_embedding_may_be_moved() -> None:
    assert movable(adapted(model_of())) == [(64, 32)]


def test_trained_embedding_stays() -> None:
    assert movable(model_of()) == []


def test_embedding_that_is_the_head_stays() -> None:
    assert movable(adapted(model_of(tied=True))) == []


def test_only_the_frozen_copy_of_a_saved_embedding_may_be_moved() -> None:
    causal = adapted(model_of(), modules_to_save=["embed_tokens"])
    [weight] = embeddings._movable(causal)
    assert not weight.requires_grad
    assert any(parameter is weight for name, parameter in causal.named_parameters() if "original_module" in name)


def test_nothing_is_moved_on_a_cpu() -> None:
    causal = adapted(model_of())
    assert embeddings.move_to_host(causal) == 0
    assert not embeddings.are_on_host(causal)


def test_embedding_is_moved_once() -> None:
    causal = adapted(model_of())
    [weight] = embeddings._movable(causal)
    weight.is_on_host = True
    assert movable(causal) == []
    assert embeddings.are_on_host(causal)
