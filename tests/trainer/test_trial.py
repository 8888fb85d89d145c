"""When a base is added, each technique is tried on a small copy of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import zoo
from run_folders import chat, lay_out, plan

from tunery.errors import UnusableModel
from tunery.failures import CannotAdapt
from tunery.spec import Lora
from worker.trainer import trial
from worker.trainer.convert import convert
from worker.trainer.recipes.qlora import QLORA
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal

NOTHING = {"lora": None, "qlora": None, "full": None}


def skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def of_family(name: str) -> Any:
    entry = zoo.FAMILIES[name]
    return skeleton(getattr(transformers, f"{entry.config_class}Config")(**zoo.SIZE | entry.shape))


def large() -> Any:
    """Returns a Llama of 70B weights without storage."""
    sizes = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    return skeleton(transformers.LlamaConfig(**sizes, intermediate_size=28672, vocab_size=128256))


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in zoo.IN_EVERY_RUN else pytest.mark.slow) for name in zoo.FAMILIES],
)
def test_small_copy_finds_what_the_zoo_states(family: str) -> None:
    found = trial.model_info(of_family(family))

    for technique, reason in found["techniques"].items():
        stated = zoo.FAMILIES[family].refused.get(technique)
        assert (reason is None) == (stated is None), reason
        assert stated is None or stated in reason
    assert (found["dropout"] is None) == (found["dora"] is None) == zoo.FAMILIES[family].dropout


def test_model_whose_rows_depend_on_the_batch_is_refused() -> None:
    """CPM-Ant attends in both directions, and places a row behind its padding."""
    sizes = {"dim_ff": 64, "dim_head": 16, "prompt_length": 4, "prompt_types": 4}
    found = trial.model_info(skeleton(transformers.CpmAntConfig(**zoo.SIZE | sizes)))

    assert found["techniques"] == dict.fromkeys(NOTHING, "what it computes of a row depends on the rows beside it")


def test_large_base_is_tried_on_a_copy_of_few_weights() -> None:
    narrow = trial.small_config(large(), narrow=True)

    assert trial.params(narrow) < 3_000_000
    assert (narrow.hidden_size, narrow.num_attention_heads, narrow.num_key_value_heads) == (256, 2, 1)
    assert narrow.head_dim == 128
    assert trial.model_info(large()) == {"techniques": NOTHING, "dropout": None, "dora": None}


def test_small_copy_has_a_layer_of_every_kind() -> None:
    deepseek = skeleton(transformers.DeepseekV3Config(first_k_dense_replace=3, num_hidden_layers=12))
    gemma = skeleton(transformers.Gemma3TextConfig(num_hidden_layers=12))

    assert [trial.small_config(model, narrow=True).num_hidden_layers for model in (deepseek, gemma)] == [4, 6]
    assert trial.small_config(gemma, narrow=True).layer_types.count("full_attention") == 1


def broken(*_: Any) -> Any:
    raise ValueError("its layers of kind X cannot be quantised.\nand much more")


def test_technique_that_fails_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trial.RECIPES, "qlora", SimpleNamespace(load_base=broken, prepare=QLORA.prepare))

    model_info = convert(str(tiny_models.llama(tmp_path / "source")), tmp_path / "base")

    assert model_info["techniques"] == NOTHING | {
        "qlora": "a training step on a small copy of it fails: its layers of kind X cannot be quantised."
    }
    assert json.loads((tmp_path / "base" / "facts.json").read_text()) == model_info


def test_base_that_no_technique_trains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in trial.TECHNIQUES:
        monkeypatch.setitem(trial.RECIPES, name, SimpleNamespace(load_base=broken, prepare=QLORA.prepare))

    with pytest.raises(UnusableModel, match=r"no technique can train it .*layers of kind X"):
        convert(str(tiny_models.llama(tmp_path / "source")), tmp_path / "base")


def test_base_whose_copy_does_not_run_passes_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_rows", broken)

    assert trial.model_info(of_family("Llama")) == {"techniques": NOTHING, "dropout": None, "dora": None}


def test_names_that_peft_refuses_are_the_users_error(tmp_path: Path) -> None:
    base = zoo.make("DeepSeek-V3", tmp_path / "base")
    alone = plan(technique=Lora(r=4, target_modules=["gate_proj"]))
    folder = lay_out(tmp_path / "run", base, alone, [chat(1)])

    with pytest.raises(CannotAdapt, match="gate_proj without also targeting up_proj"):
        prepare(folder, MessageWriter(None), StopSignal())
