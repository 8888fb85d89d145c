"""A merged model predicts as its adapter on its base does; one that does not is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from run_folders import chat
from transformers import AutoModelForCausalLM, GenerationConfig

from tunery.planning.precision import Precision, decide
from tunery.rows import messages
from tunery.rows.template import ChatTemplate
from tunery.spec import Lora, Qlora
from worker.trainer.data import Row, read_rows
from worker.trainer.export import merge, proof
from worker.trainer.export.errors import MergeDiffers, NoRoom

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("merge") / "base", bf16=True, never_said=tuple(range(6, 260)))


@pytest.fixture(scope="module")
def rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(i, words=6)) + "\n" for i in range(60)))
    return read_rows(path, ChatTemplate.load(base), 128).rows


def adapter(folder: Path, base: Path, **config: Any) -> Path:
    """A random adapter on the model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | config
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(str(folder))
    tiny_models.tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}\n')
    return folder


def source(base: Path, adapter: Path, precision: Precision | None = None) -> merge.Source:
    return merge.Source(base, adapter, precision or decide(Lora(), "cpu"), CPU)


def test_x(tmp_path, base, rows):
    record = merge.write(source(base, adapter(tmp_path / "a", base)), rows, tmp_path / "out")
    print(record, sorted(p.name for p in (tmp_path/"out").iterdir()))
    record = merge.write(source(base, tmp_path / "a", decide(Qlora(), "cpu")), rows, tmp_path / "out2")
    print(json.dumps(record, indent=1))
    assert 0
