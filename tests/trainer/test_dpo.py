"""Preference tuning: its steps against a few lines of plain torch, its reference, and interrupted runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import WORDS, Ear, Interrupting, chat, lay_out, plan, said, steps_of
from torch.nn import functional

from tunery.spec import Dpo, Evaluation, Full, General, Lora
from worker.trainer import reference
from worker.trainer.data import Example, rows_of_step
from worker.trainer.kernels import fp8
from worker.trainer.loop import _take_step
from worker.trainer.memory import MemoryPlan
from worker.trainer.process import carry_out_and_report
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training


def pair(seed: int) -> dict[str, Any]:
    """Returns a preference row in OpenAI's format, with answers of different lengths."""
    question, answer = chat(seed, words=2 + seed % 5)["messages"]
    other = WORDS[(WORDS.index(answer["content"]) + 1 + seed % 3) % len(WORDS)] + " alpha" * (seed % 3)
    return {
        "input": {"messages": [question]},
        "preferred_output": [answer],
        "non_preferred_output": [{"role": "assistant", "content": other}],
    }


PAIRS = [pair(i) for i in range(10)]


def training(folder: Path, base: Path, method: Dpo | None = None, **changes: Any) -> Training:
    lay_out(folder, base, plan(method=method or Dpo(), **changes), PAIRS, PAIRS[:3])
    t = prepare(folder, MessageWriter(None), StopSignal())
    reference.attach(t)
    return t


def log_probabilities(t: Training, example: Example) -> list[torch.Tensor]:
    """Returns each answer's log-probability, summed over its tokens, from the model's logits of one row at a time."""
    found = []
    for row in example.rows:
        logits = t.objective.causal(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        losses = functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="none")
        found.append(-losses.sum())
    return found


def plain_loss(t: Training, examples: list[Example], start: list[list[float]], method: Dpo) -> torch.Tensor:
    """Returns the mean loss over pairs. `start`: the answers' log-probabilities before training."""
    losses = []
    beta = method.decided().beta
    assert beta != "auto"
    for example, before in zip(examples, start, strict=True):
        gained = [now - then for now, then in zip(log_probabilities(t, example), before, strict=True)]
        if method.loss != "sigmoid":
            gained = [each / row.labelled for each, row in zip(gained, example.rows, strict=True)]
        lead = gained[0] - gained[1]
        ipo = (lead - 1 / (2 * beta)) ** 2
        losses.append(ipo if method.loss == "ipo" else -functional.logsigmoid(beta * lead))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=["padded", "packed"])
@pytest.mark.parametrize("method", [Dpo(), Dpo(loss="ipo", beta=0.5), Dpo(loss="dpo_norm")], ids=lambda m: m.loss)
def test_step_is_the_mean_over_its_pairs(tmp_path: Path, tiny: Path, method: Dpo, changes: dict[str, Any]) -> None:
    """Micro-batches make no difference: step 1 has one, step 2 four, and the last step has only two pairs."""
    t = training(tmp_path / "run", tiny, method, max_grad_norm=1e9, **changes)
    with torch.no_grad():
        start = [[float(each) for each in log_probabilities(t, example)] for example in t.rows.examples]
    progress = Progress()
    for step, max_tokens in ((1, 10_000), (2, 1), (3, 100)):
        t.stepper.memory = MemoryPlan(max_tokens, packed_tokens=min(max_tokens, 60) if changes else None)
        drawn = rows_of_step(10, step, 4, t.plan.seed)
        wanted = plain_loss(t, [t.rows.examples[i] for i in drawn], [start[i] for i in drawn], method)
        gradients = torch.autograd.grad(wanted, list(t.parameters.values()), allow_unused=True)
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])

        message, *_ = _take_step(t, progress)

        assert message.train_loss == pytest.approx(wanted.item(), rel=2e-5)
        assert message.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        assert message.train_accuracy is None
        shown = message.train_metrics
        assert shown["rewards_margin"] == pytest.approx(shown["rewards_chosen"] - shown["rewards_rejected"], abs=1e-6)
    assert abs(shown["rewards_margin"]) > 1e-3  # weights have moved


@pytest.mark.parametrize("method", [Dpo(), Dpo(loss="ipo", beta=0.5), Dpo(loss="dpo_norm")], ids=lambda m: m.loss)
def test_first_step_knows_no_preference(tmp_path: Path, tiny: Path, method: Dpo) -> None:
    """Model and reference are still equal, so the loss of any rows is log 2, or (1 / 2 beta)^2 for IPO."""
    t = training(tmp_path / "run", tiny, method)

    message, *_ = _take_step(t, Progress())

    assert message.train_loss == pytest.approx(1.0 if method.loss == "ipo" else math.log(2), rel=1e-6)
    assert message.train_metrics == pytest.approx(dict.fromkeys(message.train_metrics, 0.0), abs=1e-6)


def test_preferences_are_learned_without_eight_bits(
    tmp_path: Path, tiny: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit products would differ from those that measured the reference by more than one step changes the model."""
    monkeypatch.setattr(fp8, "LEAST_SIDE", 16)
    monkeypatch.setattr(fp8, "available", lambda _device: True)
    folder = lay_out(tmp_path / "run", tiny, plan(technique=Lora(r=4, precision="fp8"), method=Dpo()), PAIRS)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    [started] = said(ear, "started")
    assert started.warnings[0].startswith("precision fp8 was not used: preferences are learned")
    assert steps_of(folder)[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
    [finished] = said(ear, "finished")
    assert finished.spent["reference"].units == started.train_tokens  # once, for the quotes of later runs


def test_prompts_are_not_learned(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)

    for row, spelled in zip(t.rows.examples[0].rows, ("preferred_output", "non_preferred_output"), strict=True):
        learned = t.template.tokenizer.decode([label for label in row.labels if label >= 0], skip_special_tokens=False)
        assert learned == PAIRS[0][spelled][0]["content"] + "<|im_end|>"  # type: ignore[index]


def losses_of(folder: Path) -> list[float]:
    return [step["train_loss"] for step in steps_of(folder) if step["type"] == "step"]


def test_run_learns_to_prefer(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(method=Dpo(), n_epochs=4), PAIRS, PAIRS[:3])

    assert carry_out_and_report(folder, ear.descriptor, StopSignal()) == 0

    first, *_, last = said(ear, "step")
    assert first.train_loss == pytest.approx(math.log(2), abs=1e-5)
    assert last.train_loss < 0.5 * first.train_loss
    assert last.train_metrics["rewards_margin"] > 0.5
    assert last.train_metrics["rewards_accuracy"] == 1
    assert said(ear, "evaluated")[-1].metrics["rewards_accuracy"] == 1
    header, line, *_ = (folder / "out" / "results.csv").read_text().splitlines()
    assert header.startswith(
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,train_rewards_chosen,"
    )
    assert line.startswith("1,0.69315,,,,0.00000,")


def test_losses_are_the_recorded_ones(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(method=Dpo(), n_epochs=2), PAIRS)

    assert carry_out_and_report(folder, ear.descriptor, StopSignal()) == 0

    assert losses_of(folder) == pytest.approx([0.69315, 0.63119, 0.62545, 0.25671, 0.25409, 0.41067], rel=1e-3)


@pytest.mark.parametrize(
    "technique",
    [Lora(r=4, alpha=8, dropout=0.1), pytest.param(Full(), marks=pytest.mark.slow)],
    ids=lambda t: t.type,
)
def test_resumed_run_equals_an_unbroken_one(tmp_path: Path, tiny: Path, technique: Lora | Full) -> None:
    """The reference comes from the snapshot: nothing else of the first attempt is in the new directory."""
    rate = {"learning_rate": 1e-2 if isinstance(technique, Lora) else 1e-3}
    settled = plan(method=Dpo(), n_epochs=2, technique=technique, **rate)
    whole = lay_out(tmp_path / "whole", tiny, settled, PAIRS, PAIRS[:3])
    assert carry_out(whole, MessageWriter(None), StopSignal())
    broken = lay_out(tmp_path / "broken", tiny, settled, PAIRS, PAIRS[:3], snapshot_seconds=1e-9)
    with pytest.raises(ConnectionError):
        carry_out(broken, Interrupting(4), StopSignal())
    again = lay_out(tmp_path / "again", tiny, settled, PAIRS, PAIRS[:3])
    (broken / "snapshots" / "step-3").rename(again / "resume")

    assert carry_out(again, MessageWriter(None), StopSignal())

    assert json.dumps(steps_of(again)) == json.dumps(steps_of(whole))


def test_snapshot_holds_the_reference(tmp_path: Path, tiny: Path) -> None:
    """An attempt on another host has only the snapshot, and its device would measure slightly different numbers."""
    folder = lay_out(tmp_path / "run", tiny, plan(method=Dpo()), PAIRS, snapshot_seconds=1e-9)
    assert carry_out(folder, MessageWriter(None), StopSignal())

    assert (folder / "snapshots" / "step-3" / reference.NAME).read_bytes() == reference.path(folder).read_bytes()

    again = lay_out(tmp_path / "again", tiny, plan(method=Dpo()), PAIRS)
    (folder / "snapshots" / "step-3").rename(again / "resume")
    t = prepare(again, MessageWriter(None), StopSignal())
    for parameter in t.parameters.values():
        parameter.data.normal_()
    reference.attach(t)
    assert reference.path(again).read_bytes() == reference.path(folder).read_bytes()


def test_reference_is_that_of_the_start(tmp_path: Path, tiny: Path) -> None:
    """A later attempt reads the stored reference, because its own weights have already changed."""
    t = training(tmp_path / "run", tiny)
    start = [example.reference for example in t.rows.examples]
    for step in range(1, 4):
        _take_step(t, Progress(step=step - 1))

    reference.attach(t)

    assert [example.reference for example in t.rows.examples] == start
    reference.path(t.folder).unlink()
    reference.attach(t)
    assert [example.reference for example in t.rows.examples] != start


def test_reference_of_other_rows_or_a_damaged_one_is_not_taken(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)
    wanted = [example.reference for example in t.rows.examples]
    other = training(tmp_path / "other", tiny, max_seq_length=60)
    kept = reference.path(t.folder)
    for found in (reference.path(other.folder).read_bytes(), kept.read_bytes()[:-9], b""):
        kept.write_bytes(found)

        reference.attach(t)

        assert [example.reference for example in t.rows.examples] == wanted


def test_reference_of_a_tuned_model_is_that_model(tmp_path: Path, tiny: Path) -> None:
    """A preference run that continues a supervised adapter has that adapter, not the base, as its reference."""
    first = lay_out(tmp_path / "first", tiny, plan(n_epochs=3), [chat(i) for i in range(10)])
    assert carry_out(first, MessageWriter(None), StopSignal())
    folder = lay_out(tmp_path / "second", tiny, plan(method=Dpo(), n_epochs=3), PAIRS)
    (first / "out").rename(folder / "adapter")
    t = prepare(folder, MessageWriter(None), StopSignal())

    reference.attach(t)

    example = t.rows.examples[0]
    with torch.no_grad():
        assert example.reference == pytest.approx([float(each) for each in log_probabilities(t, example)], rel=1e-5)
        with t.objective.model.disable_adapter():  # type: ignore[operator]
            base = [float(each) for each in log_probabilities(t, example)]
    assert example.reference != pytest.approx(base, rel=1e-2)
    writer = MessageWriter(None)
    assert carry_out(folder, writer, StopSignal())
    steps = [entry for entry in writer.metrics if entry["type"] == "step"]
    assert steps[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["train_loss"] < 0.9 * steps[0]["train_loss"]


@pytest.mark.parametrize("technique", [Lora(r=4, alpha=8), Full()], ids=lambda t: t.type)
def test_scorecard_counts_pairs_that_each_model_ranks_right(
    tmp_path: Path, tiny: Path, ear: Ear, technique: Lora | Full
) -> None:
    """The base's count before training and the tuned model's after it equal a count in plain torch."""
    evaluation = Evaluation(test_file="file-test", max_rows=8, general=General(enabled=False))
    rate = 1e-2 if isinstance(technique, Lora) else 1e-3
    asked = plan(method=Dpo(), n_epochs=4, technique=technique, evaluation=evaluation, learning_rate=rate)
    folder = lay_out(tmp_path / "run", tiny, asked, PAIRS, test=PAIRS)
    t = prepare(lay_out(tmp_path / "base", tiny, plan(method=Dpo()), PAIRS), MessageWriter(None), StopSignal())
    with torch.no_grad():
        found = [[float(each) for each in log_probabilities(t, example)] for example in t.rows.examples[:8]]

    assert carry_out_and_report(folder, ear.descriptor, StopSignal()) == 0

    (card,) = said(ear, "score")
    rows = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert (card.task, card.primary, card.rows) == ("preferences", "preferred", 8)
    assert [row["base_log_probabilities"] for row in rows] == [pytest.approx(pair, rel=1e-4) for pair in found]
    before, after = card.metrics["preferred"].base, card.metrics["preferred"].tuned
    assert before == sum(chosen > other for chosen, other in found) / 8
    assert after == sum(row["tuned_right"] for row in rows) / 8 > before
    assert card.metrics["preferred"].low <= card.gain == after - before <= card.metrics["preferred"].high
    means = [[n / row.labelled for n, row in zip(pair, example.rows, strict=True)]
             for pair, example in zip(found, t.rows.examples, strict=False)]  # fmt: skip
    assert card.metrics["preferred_norm"].base == sum(chosen > other for chosen, other in means) / 8
    assert card.samples[0].wanted == PAIRS[0]["preferred_output"][0]["content"]
    [finished] = said(ear, "finished")
    compared = 2 * sum(map(len, t.rows.examples[:8]))
    assert finished.spent["pairs"].units == compared  # by both models, for the quotes of later runs


def test_test_rows_may_be_chats(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    evaluation = Evaluation(test_file="file-test", max_new_tokens=2, general=General(enabled=False))
    rows = [chat(i) for i in range(2)]
    folder = lay_out(tmp_path / "run", tiny, plan(method=Dpo(), evaluation=evaluation), PAIRS, test=rows)

    assert carry_out_and_report(folder, ear.descriptor, StopSignal()) == 0

    assert said(ear, "score")[0].task == "text"
