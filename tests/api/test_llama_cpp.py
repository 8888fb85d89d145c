"""Chats through the API and the model server to llama.cpp's server, which applies the adapter of each chat."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp
import other_clients
import pytest
import tiny_models
import torch
from asgi import serving
from cloned_databases import Database
from fastapi import FastAPI
from fleets import PublishedModels
from llama_cpp_fleet import LlamaCppReplica
from peft import PeftModel
from teams import BASE, Team
from transformers import AutoModelForCausalLM

from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from worker.trainer.export import gguf_adapter, gguf_writer

QUESTIONS = ("Where is my card?", "a", "What now")
TOKENS = 12


def _plain(base: Path, adapter: Path | None, question: str) -> str:
    """The greedy answer of plain transformers and peft."""
    template = ChatTemplate.load(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    prompt = template.encode_prompt([Message.model_validate({"role": "user", "content": question})], None)
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    ids = model.generate(input_ids=torch.tensor([prompt]), attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    return str(template.tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True))


@pytest.mark.slow
def test_each_chat_has_its_adapter(
    database: Database, team: Team, make_app: Callable[..., FastAPI], tmp_path: Path
) -> None:
    base = tiny_models.with_a_merge(tiny_models.llama(tmp_path / "base", seed=1, bf16=True, hidden_size=64))
    gguf_writer.write(base, out=tmp_path / "model-f16.gguf", kind="f16", name="tiny")
    folders = [tiny_models.lora(tmp_path / name, base, seed=seed) for seed, name in enumerate(("one", "two"), 3)]
    for folder in folders:
        tiny_models.with_a_merge(folder)
        gguf_adapter.write(base, folder, out=tmp_path / f"{folder.name}.gguf", name="tiny")
    published = PublishedModels(database, base, tmp_path)
    models: dict[str, Path | None] = {BASE: None, **{published.add(team, folder): folder for folder in folders}}
    digests = [published.digest(model) for model, folder in models.items() if folder is not None]
    python = other_clients.install("llama-cpp") / "bin" / "python"
    with ExitStack() as stack:
        files = [tmp_path / f"{folder.name}.gguf" for folder in folders]
        engine = stack.enter_context(llama_cpp.serve(python, tmp_path / "model-f16.gguf", *files, context=256))
        replica = LlamaCppReplica(engine.address, BASE, digests, context=256)
        address = stack.enter_context(published.serving(stack.enter_context(serving(replica.app))))
        client = team.on(make_app(server_url=address)).openai(strict=True)
        for question in QUESTIONS:
            wanted = {model: _plain(base, folder, question) for model, folder in models.items()}
            assert len(set(wanted.values())) == 3
            for model, answer in wanted.items():
                said = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=TOKENS
                )
                assert said.choices[0].message.content == answer
