"""A QLoRA adapter is scored on its 4-bit base and on the stored base, with the difference on the same rows."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import two_ranks
from run_folders import Ear, chat, lay_out, plan, said

from tunery.spec import Dpo, Evaluation, General, Lora, Method, Plan, Qlora, Resources, Supervised
from tunery.trainer_protocol import Score
from worker.trainer import run
from worker.trainer.recipes.lora import LORA
from worker.trainer.report import MessageWriter
from worker.trainer.scoring import answers, comparison, unquantised
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

TEST = [chat(i) for i in range(100, 116)]
PAIRS = [
    {
        "prompt": row["messages"][0]["content"],
        "chosen": row["messages"][1]["content"],
        "rejected": chat(900 + i)["messages"][1]["content"],
    }
    for i, row in enumerate([chat(i) for i in range(8)])
]
METHODS: dict[str, tuple[Method, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "sft": (Supervised(), [chat(i) for i in range(16)], TEST),
    "dpo": (Dpo(), PAIRS, PAIRS),
}


def asked(method: Method, *, both: bool, **technique: Any) -> Plan:
    quick = Evaluation(test_file="file-1", max_new_tokens=4, general=General(enabled=False), unquantised=both)
    kind = technique.pop("kind", Qlora)
    return plan(method=method, technique=kind(r=4, alpha=8, **technique), n_epochs=4, evaluation=quick)


def scored_alone(folder: Path, base: Path, adapter: Path, settled: Plan, rows: list[dict[str, Any]]) -> Score:
    alone = lay_out(folder, base, settled, rows, test=rows)
    shutil.copytree(adapter, alone / "adapter")
    scored = run.score(alone, MessageWriter(None), StopSignal())
    assert scored is not None
    return scored[0]


@pytest.mark.parametrize("name", METHODS)
def test_both_precisions_are_scored_and_compared_on_the_same_rows(
    tmp_path: Path, tiny: Path, ear: Ear, name: str
) -> None:
    method, rows, test = METHODS[name]
    folder = lay_out(tmp_path / "run", tiny, asked(method, both=True, compute_dtype="float32"), rows, test=test)
    assert run.carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    card = json.loads((folder / "out" / "scorecard.json").read_text())

    assert [said_card.unquantised.scored_in for said_card in said(ear, "score")] == ["float32"]
    as_lora = scored_alone(tmp_path / "lora", tiny, folder / "out", asked(method, both=False, kind=Lora), test)
    in_four_bits = scored_alone(tmp_path / "nf4", tiny, folder / "out", asked(method, both=False), test)
    assert (card["scored_in"], as_lora.unquantised, in_four_bits.scored_in) == ("nf4", None, "nf4")
    assert card["metrics"].keys() == card["unquantised"]["metrics"].keys()
    for metric, found in card["unquantised"]["metrics"].items():
        assert {name: found[name] for name in ("base", "tuned", "gain", "low", "high", "p")} == (
            as_lora.metrics[metric].model_dump()
        )
        assert found["difference"] == pytest.approx(found["tuned"] - card["metrics"][metric]["tuned"])
        assert found["difference_low"] <= found["difference"] <= found["difference_high"]


@pytest.mark.slow
def test_two_ranks_score_as_one_does(tmp_path: Path, tiny: Path) -> None:
    both = asked(Supervised(), both=True, compute_dtype="float32")
    rows = METHODS["sft"][1]
    alone = lay_out(tmp_path / "alone", tiny, both, rows, test=TEST)
    shared = lay_out(
        tmp_path / "shared", tiny, both.model_copy(update={"resources": Resources(gpus=2)}), rows, test=TEST
    )
    cut = lay_out(
        tmp_path / "cut",
        tiny,
        both.model_copy(update={"resources": Resources(gpus=2, sharding="full_shard")}),
        rows,
        test=TEST,
    )
    assert run.carry_out(alone, MessageWriter(None), StopSignal())
    two_ranks.spawn(tmp_path, f"whole:{shared}", f"whole:{cut}")

    found = {each: json.loads((each / "out" / "scorecard.json").read_text()) for each in (alone, shared, cut)}

    assert found[shared]["unquantised"] == found[alone]["unquantised"]
    assert found[cut]["unquantised"]["left_out"].startswith("the model is sharded")
    assert found[cut]["metrics"]["exact"]


def test_difference_is_of_the_adapter_in_its_two_precisions(tmp_path: Path, tiny: Path) -> None:
    said_here, said_there = ["a", "b", "c"], {True: ["x", "x", "x"], False: ["a", "b", "x"]}
    t = _training(tmp_path, tiny)

    def score(first: list[str], second: list[str]) -> Any:
        return comparison._compare([_question("a"), _question("b"), _question("c")], first, second)[0]

    found = unquantised.measure(t, said_here, lambda _, base: said_there[base], score).metrics["exact"]

    assert (found.base, found.tuned) == (0, pytest.approx(2 / 3))
    assert found.difference == pytest.approx(-1 / 3)


def _question(wanted: str) -> Any:
    return answers.Question([1], wanted, [{"role": "user", "content": "?"}])


def _training(folder: Path, tiny: Path) -> Training:
    made = lay_out(folder / "run", tiny, asked(Supervised(), both=True), TEST[:4], test=TEST[:4])
    return run.prepare(made, MessageWriter(None), StopSignal())


def test_base_without_room_is_left_out_with_the_reason(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    t = _training(tmp_path, tiny)
    monkeypatch.setattr(unquantised, "LORA", SimpleNamespace(load_base=full, prepare=LORA.prepare))

    found = unquantised.measure(t, [], lambda *_: [], lambda *_: None)  # type: ignore[arg-type,return-value]

    assert (found.scored_in, found.metrics) == ("float32", {})
    assert found.left_out == "the device has too little memory for the base in float32 beside the trained model"
