"""Commands that run a model elsewhere: what is offered for which files, and that the plain one works."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tunery.cli import downloads
from tunery.planning import engines

ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"]
WHOLE = ["config.json", "model.safetensors"]


def offered(paths: list[str], rank: int | None = None) -> list[tuple[str, str]]:
    return [(each.engine, each.files) for each in engines.commands(paths, "tuned", rank=rank)]


def test_engines_follow_the_files() -> None:
    assert offered(ADAPTER, 8) == [("peft", ""), ("vllm", "")]
    assert offered(WHOLE) == [("transformers", ""), ("vllm", "")]
    more = ["merged/config.json", "fp8/config.json", "gguf/model-q8_0.gguf", "gguf/adapter-f32.gguf", "gguf/Modelfile"]
    assert offered(ADAPTER + more, 8)[2:] == [
        ("transformers", "merged"),
        ("vllm", "merged"),
        ("transformers", "fp8"),
        ("vllm", "fp8"),
        ("llama.cpp", "gguf/model-q8_0.gguf"),
        ("llama.cpp", "gguf/adapter-f32.gguf"),
        ("ollama", "gguf/Modelfile"),
    ]
    assert ("ollama", "gguf/Modelfile") not in offered([*ADAPTER, "gguf/adapter-f32.gguf", "gguf/Modelfile"], 8)


@pytest.mark.parametrize(("rank", "limit"), [(1, 8), (8, 8), (9, 16), (64, 64), (300, 320)])
def test_vllm_is_given_a_rank_that_it_knows(rank: int, limit: int) -> None:
    [_, vllm] = engines.commands(ADAPTER, "tuned", rank=rank)
    assert f"--max-lora-rank {limit} " in vllm.command
    assert vllm.command.startswith("vllm serve tuned/base --enable-lora")


def test_the_download_brings_an_adapters_base() -> None:
    assert engines.download("ft:a:b::c", "tuned", ADAPTER) == "tunery models download ft:a:b::c --with-base -o tuned"
    assert engines.download("my base", "base", WHOLE) == "tunery models download 'my base' -o base"


@pytest.mark.slow
def test_the_plain_commands_answer(tmp_path: Path) -> None:
    import tiny_models

    base = tiny_models.llama(tmp_path / "plain")
    tuned = tiny_models.lora(tmp_path / "tuned", base)
    shutil.copytree(base, tuned / downloads.BASE)
    for folder in ("tuned", "plain"):
        paths = [path.name for path in (tmp_path / folder).iterdir()]
        if folder == "tuned":
            downloads.point_at_base(tuned, tuned / downloads.BASE)
            assert json.loads((tuned / "adapter_config.json").read_text())["base_model_name_or_path"]
        command = engines.commands(paths, folder, rank=8)[0].command.replace("python", sys.executable, 1)
        ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip()
