"""The benchmark of a large shape, on a tiny one: what is measured, and what records no decoding step."""

from pathlib import Path
from typing import Any

import lora_by_address
import pytest
from op_recorder import OpRecorder

from bench import make_model, serving_shape
from worker.server import bank

TINY = (32, 64, 2, 4, 2, make_model.TOKENS + 1000)
"""Of make_model.SHAPES; like the large ones it has more token ids than the tokenizer has tokens."""
FEWER = {"VOCABULARY": 200, "MIXED": 4, "RESIDENT": 6, "ROUNDS": 2, "MANY": 12, "REQUESTS": 8}


def test_stages_report_what_they_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "kernel_for", lambda _device: lora_by_address.add)
    monkeypatch.setattr(serving_shape, "recorder_for", lambda _model: lambda: OpRecorder(bytes_each=2**20))
    monkeypatch.setitem(make_model.SHAPES, "tiny", TINY)
    for name, value in FEWER.items():
        monkeypatch.setattr(serving_shape, name, value)
    stages = serving_shape.stages_of(
        lambda: make_model.ready(tmp_path, "tiny"), tmp_path, device="cpu", rank=4, graphs=True, streams=4, tokens=8
    )
    found: dict[str, Any] = {name: stage() for name, stage in stages.items()}

    assert found["tokens_per_second"].keys() >= {"one", "mixed_adapters", "mixed_of_base"}
    assert found["memory"]["graphs"] > 2**20
    assert found["loading_seconds"]["fetch_median"] <= found["loading_seconds"]["worst"]
    assert found["switching"]["mixed_of_switching"] > 0
    assert found["seconds_a_token"].keys() == {"base", "adapter", "merged"}
    assert 1 < found["zipf_all_resident"]["adapters_asked"] <= 8
    assert found["zipf_64_slots"]["slots_of_all"] > 0
    assert found["traffic"]["adapters_that_change"]["recorded"] == 0
    assert found["in_turn"]["adapters"]["recorded"] <= 1
