"""Which input embeddings may be in the host's memory; test_gpu.py looks them up there."""

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from worker.trainer import embeddings
from worker.trainer.objective import Objective

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


def test_embedding_that_is_trained_beside_adapters_stays() -> None:
    assert movable(adapted(model_of(), modules_to_save=["embed_tokens"])) == []


def test_embedding_with_trained_rows_stays() -> None:
    """Each lookup would put them into a copy of the whole table."""
    assert movable(adapted(model_of(), trainable_token_indices=[1, 2])) == []


def test_nothing_is_moved_on_a_cpu() -> None:
    causal = adapted(model_of())
    assert embeddings.move_to_host(Objective(causal)) == 0
    assert not embeddings.are_on_host(causal)


def test_embedding_that_is_cut_over_gpus_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective(adapted(model_of()))
    objective.is_sharded = True
    monkeypatch.setattr(embeddings, "_movable", lambda _: pytest.fail("asked for the weight of a whole model"))
    assert embeddings.move_to_host(objective) == 0


def test_embedding_is_moved_once() -> None:
    causal = adapted(model_of())
    [weight] = embeddings._movable(causal)
    weight.is_on_host = True
    assert movable(causal) == []
    assert embeddings.are_on_host(causal)
