"""The measurement of the textbook's case: what it sends, and that it is a whole job."""

import random
from pathlib import Path

import pytest
import tiny_models

from bench import make_model, textbook_run
from worker.io.programs import Program


def test_rows_have_the_wanted_tokens() -> None:
    tokenizer, numbers = make_model._tokenizer(), random.Random(0)
    for wanted in (31, 190, 2048):
        row = textbook_run.conversation(wanted, numbers)
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == wanted


@pytest.mark.slow
def test_the_textbook_run_is_a_whole_job_with_default_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, begin, took = tiny_models.llama(tmp_path / "base", max_position_embeddings=4096), Program.begin, list[bool]()

    def begin_and_note(program: Program, arguments: list[str]) -> bool:
        took.append(begin(program, arguments))
        return took[-1]

    monkeypatch.setattr(Program, "begin", begin_and_note)
    found = textbook_run.measure(base, "real", 64)
    assert found.get("failed") is None, found["log"]
    plan = found["plan"]
    assert (plan["technique"]["type"], plan["n_epochs"], plan["batch_size"]) == ("qlora", 3, 8)
    assert plan["learning_rate_multiplier"] == 1.0
    assert found["steps"] == 24
    assert [step for kind, step, _ in found["checkpoints"] if kind == "public"] == [8, 16, 24]
    assert len(found["valid_losses"]) == 3
    assert found["score"]["rows"] == 8
    assert found["score"]["general"]["items"] == 100
    assert found["served"]["rows"] == 8
    assert took == [True], "the check's process has waited"
    at, seconds = found["at"], found["seconds"]
    assert 0 < at["started"] < at["first_step"] < at["last_step"] < at["score"] < at["finished"] <= seconds["run"] + 0.1
    assert seconds["all"] == pytest.approx(seconds["files"] + seconds["run"] + seconds["served_check"])
