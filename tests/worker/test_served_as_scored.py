"""A QLoRA adapter answers in the model server as its scorecard says, on the base in the same four bits."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import tiny_models
from run_folders import chat, lay_out, plan

from tunery.artifacts import manifest
from tunery.spec import Evaluation, Qlora
from tunery.storage import Directory
from worker.server.backends.embedded import Engine
from worker.server.schemas import ChatRequest, parse
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(8)]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of a run that has trained and scored."""
    root = tmp_path_factory.mktemp("run")
    settled = plan(
        technique=Qlora(r=8, double_quant=False, compute_dtype="float32"),
        n_epochs=3,
        evaluation=Evaluation(test_file="file-test", max_new_tokens=12, general={"enabled": False}),
    )
    folder = lay_out(root / "run", tiny_models.llama(root / "base"), settled, ROWS, test=ROWS)
    assert carry_out(folder, MessageWriter(None), StopSignal())
    return folder


@dataclass(frozen=True)
class Published:
    """A run's base and result in storage, described as in the API's requests."""

    storage: Directory
    files: dict[str, dict[str, str]]

    def ask(self, messages: list[dict[str, Any]], technique: str = "qlora") -> ChatRequest:
        chosen = {"base": self.files["base"], "tuned": {**self.files["tuned"], "technique": technique}}
        body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 12, "tunery_model": chosen}
        return parse(json.dumps(body).encode())


@pytest.fixture
def published(scored: Path, tmp_path: Path) -> Published:
    storage, files = Directory(tmp_path / "objects"), {}
    for name, folder in (("base", scored / "base"), ("tuned", scored / "out")):
        _, sha256 = manifest.publish(storage, f"models/{name}", folder.resolve())
        files[name] = {"id": name, "prefix": f"models/{name}", "manifest_sha256": sha256}
    return Published(storage, files)


def _packed(engine: Engine) -> list[bitsandbytes.nn.Linear4bit]:
    assert engine._ready is not None
    return [layer for layer in engine._ready.model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]


def test_answers_are_those_of_the_scorecard(scored: Path, published: Published, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (scored / "out" / "answers.jsonl").read_text().splitlines()]
    engine = Engine(tmp_path / "models", published.storage)

    given = ["".join(engine.answer(published.ask(row["messages"]))) for row in rows]

    assert given == [row["tuned"] for row in rows]
    assert len(set(given)) > 1
    assert json.loads((scored / "out" / "scorecard.json").read_text())["scored_in"] == "nf4"
    assert json.loads((scored / "out" / "training_config.json").read_text())["scored_in"] == "nf4"
    states = [layer.weight.quant_state for layer in _packed(engine)]
    assert states
    assert {(state.quant_type, state.nested) for state in states} == {("nf4", False)}  # the job's, not the default


def test_base_is_unquantised_where_the_operator_or_the_technique_says_so(published: Published, tmp_path: Path) -> None:
    messages = ROWS[0]["messages"][:1]
    engine = Engine(tmp_path / "models", published.storage, qlora_base="unquantised")
    "".join(engine.answer(published.ask(messages)))
    assert not _packed(engine)

    engine = Engine(tmp_path / "models", published.storage)
    "".join(engine.answer(published.ask(messages)))
    assert _packed(engine)
    "".join(engine.answer(published.ask(messages, technique="lora")))
    assert not _packed(engine), "the same base in another type is loaded again"
