"""An evaluation has no dropout, does not change the training, and ends each answer at its stop token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import chat, lay_out, plan

from tunery.rows.messages import Example
from tunery.spec import Evaluation, Lora
from worker.trainer import validation
from worker.trainer.decoding import decoder
from worker.trainer.generation import Greedy
from worker.trainer.loop import train
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.scoring import answers
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i) for i in range(10)]
DROPOUT = Lora(r=4, alpha=64, dropout=0.5)


def start(folder: Path, base: Path, valid: list[dict[str, Any]] | None = None, **changes: Any) -> Training:
    return prepare(lay_out(folder, base, plan(**changes), ROWS, valid), MessageWriter(None), StopSignal())


def losses(t: Training) -> list[float]:
    train(t, Progress())
    return [entry["train_loss"] for entry in t.writer.metrics if entry["type"] == "step"]


def test_evaluating_changes_nothing_about_the_training(tmp_path: Path, tiny: Path) -> None:
    """Dropout draws the same numbers with and without an evaluation, and is active again after it."""
    settled = {"technique": DROPOUT, "n_epochs": 3, "evaluation": Evaluation(every_steps=1)}
    measured = start(tmp_path / "measured", tiny, ROWS[:4], **settled)
    found = losses(measured)

    assert found == losses(start(tmp_path / "unmeasured", tiny, **settled))
    assert sum(entry["type"] == "evaluated" for entry in measured.writer.metrics) == 9


def test_dropout_is_part_of_the_training(tmp_path: Path, tiny: Path) -> None:
    found, other = (
        losses(start(tmp_path / str(p), tiny, technique=Lora(r=4, alpha=64, dropout=p), n_epochs=2)) for p in (0.5, 0.0)
    )

    assert found[0] == other[0]  # an adapter's B is zero at first
    assert all(abs(a - b) > 1e-3 for a, b in zip(found[1:], other[1:], strict=True))


def test_validation_loss_is_the_mean_over_tokens_without_dropout(tmp_path: Path, tiny: Path) -> None:
    t = start(tmp_path / "run", tiny, ROWS, technique=DROPOUT)
    for name, parameter in t.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    t.objective.train()
    assert t.valid is not None

    loss, accuracy, _ = validation.loss(t.stepper, t.valid.examples)

    assert t.objective.training
    t.objective.eval()
    total = correct = labels = 0.0
    for row in t.valid.rows:
        logits = t.objective.causal(torch.tensor([row.input_ids])).logits[0, :-1]
        wanted = torch.tensor(row.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").detach())
        correct += int((logits.argmax(-1) == wanted).sum())
        labels += int((wanted >= 0).sum())
    assert (loss, accuracy) == pytest.approx((total / labels, correct / labels), rel=1e-5)


@pytest.mark.parametrize("against", [None, "by transformers"])
def test_answer_ends_with_the_stop_token(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, against: str | None
) -> None:
    """Cutting a longer answer afterwards would give the same text, but every row would cost max_new_tokens."""
    monkeypatch.setattr(decoder, "reason_against", lambda _: against)
    evaluation = Evaluation(max_new_tokens=60)
    t = start(tmp_path / "run", tiny, n_epochs=30, technique=Lora(r=16), evaluation=evaluation)
    train(t, Progress())
    asked = answers.questions(t.template, [Example.model_validate(row) for row in ROWS[:4]])
    passes: list[int] = []

    def count(_causal: Any, _args: Any, given: dict[str, Any]) -> None:
        passes.append(given["input_ids"].shape[1] if given["use_cache"] else 0)

    t.objective.causal.register_forward_pre_hook(count, with_kwargs=True)

    found = answers.generate(t, asked, base=False)

    assert found == [question.wanted for question in asked]
    steps = passes[len(passes) - passes[::-1].index(max(passes)) :]  # after the prompts, read last for the answers
    assert steps.count(1) == max(map(len, found))  # one token a byte; the last pass gives the stop token
    assert t.objective.training


def test_base_is_asked_without_its_adapter(tmp_path: Path, tiny: Path) -> None:
    t, untouched = (start(tmp_path / name, tiny) for name in ("tuned", "untouched"))
    for name, parameter in t.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    asked = answers.questions(t.template, [Example.model_validate(row) for row in ROWS[:4]])

    base, tuned, again = (answers.generate(t, asked, base=base) for base in (True, False, True))

    assert base == answers.generate(untouched, asked, base=False) == again
    assert base != tuned


@pytest.mark.parametrize("against", [None, "by transformers"])
def test_answers_that_run_out_of_memory_are_given_in_smaller_batches(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, against: str | None
) -> None:
    monkeypatch.setattr(decoder, "reason_against", lambda _: against)
    t = start(tmp_path / "run", tiny, evaluation=Evaluation(max_new_tokens=4))
    asked = answers.questions(t.template, [Example.model_validate(row) for row in ROWS])
    wanted = answers.generate(t, asked, base=False)
    usual, sizes, most = Greedy.answer, [], 3

    def answer(greedy: Greedy, prompts: list[list[int]]) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(greedy, prompts)

    monkeypatch.setattr(Greedy, "answer", answer)

    assert answers.generate(t, asked, base=False) == wanted
    assert sizes == [10, 5, 2, 2, 2, 2, 2]  # halved after each failure
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        answers.generate(t, asked, base=False)
