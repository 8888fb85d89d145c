"""The benchmark of a large shape, on a tiny one: what is measured, and what records no decoding step."""

from typing import Any

import lora_by_address
import pytest
import torch
from op_recorder import OpRecorder
from transformers import LlamaConfig

from bench import serving_shape
from worker.server import bank

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_stages_report_what_they_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "kernel_for", lambda _device: lora_by_address.add)
    monkeypatch.setattr(serving_shape, "recorder_for", lambda _model: lambda: OpRecorder(bytes_each=2**20))
    for name, value in {"VOCABULARY": 200, "MIXED": 4, "RESIDENT": 6, "ROUNDS": 1}.items():
        monkeypatch.setattr(serving_shape, name, value)
    large = serving_shape.Large(TINY, "cpu", torch.float32, rank=4, graphs=True)
    found: dict[str, Any] = {name: stage() for name, stage in large.stages(4, 8).items()}

    assert found["tokens_per_second"].keys() >= {"one", "mixed_adapters", "mixed_of_base"}
    assert found["in_turn"]["adapters"]["recorded"] <= 1
    assert found["traffic"]["adapters_that_change"]["recorded"] == 0
    assert found["memory"]["graphs"] > 2**20
    assert found["loading_seconds"]["fetch_median"] <= found["loading_seconds"]["worst"]
    assert found["switching"]["tokens_per_second"] > 0
