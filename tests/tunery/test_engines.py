"""Commands that run a model elsewhere: which are offered for which files."""

from typing import Any

import pytest

from tunery.planning import engines

ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"]
CONFIG: dict[str, Any] = {"r": 8, "target_modules": ["q_proj"]}
WHOLE = ["config.json", "model.safetensors"]


def offered(paths: list[str], **config: Any) -> list[tuple[str, str]]:
    return [(each.engine, each.files) for each in engines.commands(paths, "tuned", CONFIG | config)]


def test_engines_follow_the_files() -> None:
    assert offered(ADAPTER) == [("peft", ""), ("vllm", "")]
    assert offered(WHOLE) == [("transformers", ""), ("vllm", "")]
    more = ["merged/config.json", "fp8/config.json", "gguf/model-q8_0.gguf", "gguf/adapter-f32.gguf", "gguf/Modelfile"]
    assert offered(ADAPTER + more)[2:] == [
        ("transformers", "merged"),
        ("vllm", "merged"),
        ("transformers", "fp8"),
        ("vllm", "fp8"),
        ("llama.cpp", "gguf/model-q8_0.gguf"),
        ("llama.cpp", "gguf/adapter-f32.gguf"),
        ("ollama", "gguf/Modelfile"),
    ]
    assert ("ollama", "gguf/Modelfile") not in offered([*ADAPTER, "gguf/adapter-f32.gguf", "gguf/Modelfile"])


@pytest.mark.parametrize("option", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 1024}])
def test_vllm_is_not_offered_for_what_it_cannot_load(option: dict[str, Any]) -> None:
    assert offered(ADAPTER, **option) == [("peft", "")]


@pytest.mark.parametrize(("rank", "limit"), [(1, 8), (8, 8), (9, 16), (64, 64), (300, 320)])
def test_vllm_is_given_a_rank_that_it_knows(rank: int, limit: int) -> None:
    [_, vllm] = engines.commands(ADAPTER, "tuned", {**CONFIG, "r": rank})
    assert f"--max-lora-rank {limit} " in vllm.command
    assert vllm.command.startswith("vllm serve tuned/base --enable-lora")


def test_the_download_brings_an_adapters_base() -> None:
    assert engines.download("ft:a:b::c", "tuned", ADAPTER) == "tunery models download ft:a:b::c --with-base -o tuned"
    assert engines.download("my base", "base", WHOLE) == "tunery models download 'my base' -o base"
