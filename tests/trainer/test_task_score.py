"""A run scores the task on validation rows while it trains, without changing the training, and picks the best step."""

from pathlib import Path
from typing import Any

import pytest
from run_folders import Ear, chat, lay_out, plan, said, steps_of

from tunery.failures import InvalidTrainingFile
from tunery.spec import EarlyStopping, Evaluation, Lora
from worker.trainer.generation import Greedy
from worker.trainer.loop import train
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress

ROWS = [chat(i) for i in range(6)]
LEARNT = {"n_epochs": 60, "technique": Lora(r=16), "batch_size": 6}


def test_scoring_the_task_changes_nothing_about_the_training(tmp_path: Path, tiny: Path) -> None:
    """Dropout draws the same numbers with and without answers between two steps."""
    found = []
    for rows in (0, 3):
        settled = plan(technique=Lora(r=4, alpha=64, dropout=0.5), n_epochs=3, evaluation=Evaluation(task_rows=rows))
        t = prepare(lay_out(tmp_path / str(rows), tiny, settled, ROWS, ROWS[:4]), MessageWriter(None), StopSignal())
        train(t, Progress())
        found.append(t.writer.metrics)
    losses, with_task = ([entry.get("train_loss", entry.get("loss")) for entry in metrics] for metrics in found)

    assert losses == with_task
    scored = [entry for entry in found[1] if entry["type"] == "evaluated"]
    assert len(scored) == 3
    assert all((entry["task_metric"], entry["task_rows"]) == ("chrf", 3) for entry in scored)
    assert all(0 <= entry["task_score"] < 1 for entry in scored)
    assert [sample["wanted"] for sample in scored[0]["samples"]] == [
        ROWS[i]["messages"][-1]["content"] for i in (0, 1, 2)
    ]
    assert {entry["task_score"] for entry in found[0] if entry["type"] == "evaluated"} == {None}


def test_the_task_ends_the_run_and_its_best_step_becomes_the_model(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    """The loss of memorised rows falls until the end, while the score reaches its maximum long before."""
    by_task = EarlyStopping(patience=3, metric="task")
    settled = plan(**LEARNT, early_stopping=by_task, evaluation=Evaluation(task_rows=4, every_steps=4))
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, ROWS)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [finished] = said(ear, "finished")
    evaluated = {message.step: message for message in said(ear, "evaluated")}
    scores = {step: message.task_score for step, message in evaluated.items()}
    losses = {step: message.loss for step, message in evaluated.items()}
    assert finished.stopped_early
    assert finished.step == max(scores, key=scores.__getitem__)  # the first of equal scores
    assert finished.steps == finished.step + 3 * 4 < 60
    assert min(losses, key=losses.__getitem__) == finished.steps  # by the loss, the last step would be best
    assert scores[finished.step] == 1
    shown = evaluated[finished.step].samples
    assert [sample["answer"] for sample in shown] == [sample["wanted"] for sample in shown]


def test_a_stop_during_an_evaluation_loses_none_of_it(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_task = EarlyStopping(patience=100, metric="task")
    settled = plan(n_epochs=4, early_stopping=by_task, evaluation=Evaluation(task_rows=4))
    unbroken = lay_out(tmp_path / "unbroken", tiny, settled, ROWS, ROWS)
    assert carry_out(unbroken, MessageWriter(None), StopSignal())
    folder, stop_signal, usual = lay_out(tmp_path / "broken", tiny, settled, ROWS, ROWS), StopSignal(), Greedy.answer

    def stopping(*arguments: Any) -> list[list[int]]:
        stop_signal.received = True
        return usual(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Greedy, "answer", stopping)
        assert not carry_out(folder, MessageWriter(None), stop_signal)
    assert carry_out(folder, MessageWriter(None), StopSignal())

    assert steps_of(folder) == steps_of(unbroken)
    adapters = [(run / "out" / "adapter_model.safetensors").read_bytes() for run in (folder, unbroken)]
    assert adapters[0] == adapters[1]


def test_rows_are_spread_over_the_file_and_must_end_with_an_answer(tmp_path: Path, tiny: Path) -> None:
    asking = [{"messages": [*chat(i)["messages"], {"role": "user", "content": "and?"}]} for i in range(2)]
    valid = [asking[0], *(chat(100 + i) for i in range(9))]
    settled = plan(evaluation=Evaluation(task_rows=3))
    t = prepare(lay_out(tmp_path / "run", tiny, settled, ROWS, valid), MessageWriter(None), StopSignal())

    assert [question.messages[-1]["content"] for question in t.task_questions] == [
        chat(100 + i)["messages"][0]["content"] for i in (0, 3, 6)
    ]
    with pytest.raises(InvalidTrainingFile, match="No example ends with an answer"):
        prepare(lay_out(tmp_path / "none", tiny, settled, ROWS, asking), MessageWriter(None), StopSignal())
