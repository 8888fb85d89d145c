"""Answers to prompts get the same scores as a scorecard gives the same rows."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from run_folders import chat, lay_out, plan

from tunery.planning.intervals import wilson
from tunery.planning.prompting import AnswerOrder, Variant
from tunery.spec import Evaluation, General
from worker.trainer import run
from worker.trainer.prompting import measure
from worker.trainer.report import MessageWriter
from worker.trainer.scoring import latency
from worker.trainer.stop_signal import StopSignal

TEST = [chat(i) for i in range(100, 106)]
ZERO = Variant(shots=0)


def folder_of(tmp_path: Path, base: Path) -> Path:
    """Returns a run directory with an adapter that changes answers, and the test rows as zero-shot prompts."""
    asked = Evaluation(test_file="file-1", max_new_tokens=6, general=General(enabled=False))
    folder = lay_out(tmp_path / "run", base, plan(evaluation=asked), TEST, test=TEST)
    tiny_models.lora(folder / "adapter", base)
    (folder / "prompts").mkdir()
    shutil.copy(folder / "data" / "test.jsonl", folder / "prompts" / f"{ZERO.name}.jsonl")
    return folder


def test_base_and_tuned_model_answer_as_in_the_scorecard(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where answers take so long that only one is timed."""
    monkeypatch.setattr(latency, "_SECONDS", 0.0)
    compare_with_the_scorecard(folder_of(tmp_path, tiny), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this on a host with a GPU")
def test_a_gpu_that_the_program_sees_answers_as_in_its_scorecard(tmp_path: Path, tiny: Path) -> None:
    compare_with_the_scorecard(folder_of(tmp_path, tiny), torch.cuda.get_device_name())


def compare_with_the_scorecard(folder: Path, device: str) -> None:
    scored = run.score(folder, MessageWriter(None), StopSignal())
    assert scored is not None
    card, rows = scored
    assert any(row["base"] != row["tuned"] for row in rows)
    for name in ("base", "tuned"):
        [(score, said)] = measure.answered(folder, AnswerOrder(variants=[ZERO], tuned=name == "tuned"))
        assert [one["answer"] for one in said] == [row[name] for row in rows]
        assert score.primary == card.primary
        figures = {key: figure.score for key, figure in score.metrics.items()}
        assert figures == {key: getattr(figure, name) for key, figure in card.metrics.items()}
        exact = score.metrics["exact"]
        assert (exact.low, exact.high) == wilson(round(exact.score * 6), 6)
        assert (score.rows, score.device) == (6, device)
        assert score.p50_seconds is not None
        assert score.p50_seconds > 0
    assert (folder / "progress").read_text() == "1.000"


def test_answers_of_another_program_are_scored_alike(tmp_path: Path, tiny: Path) -> None:
    folder = folder_of(tmp_path, tiny)
    (folder / "given").mkdir()
    wanted = [row["messages"][-1]["content"] for row in TEST]
    said = [
        {"text": text if place else "wrong", "prompt_tokens": 10 + place, "answer_tokens": None, "seconds": place / 10}
        for place, text in enumerate(wanted)
    ]
    (folder / "given" / f"{ZERO.name}.json").write_text(json.dumps(said))
    [(score, rows)] = measure.given(folder, AnswerOrder(variants=[ZERO], given=True))
    assert score.metrics["exact"].score == 5 / 6
    assert [row["right"] for row in rows] == [False] + [True] * 5
    assert (score.prompt_tokens, score.answer_tokens, score.p50_seconds, score.device) == (12.5, None, 0.25, None)
