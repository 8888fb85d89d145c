"""A run estimates the time that it still needs."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_folders import Ear, chat, lay_out, plan, said

from tunery.spec import Evaluation, General
from worker.trainer import step_timer
from worker.trainer.decoding import decoder
from worker.trainer.generation import Greedy
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.step_timer import StepTimer, Work
from worker.trainer.stop_signal import StopSignal


def _timed(work: Work, *, step: int, seconds: float = 3.0) -> StepTimer:
    made = StepTimer(work)
    made.note("step", seconds)
    made.step = step
    return made


def test_what_was_not_measured_is_estimated_from_the_steps_and_the_sizes() -> None:
    """A step of 100 tokens takes 3 s, so one token of a forward pass is estimated at 10 ms."""
    work = Work(steps=10, steps_per_epoch=5, step_tokens=100, every=5, valid_tokens=200)
    assert _timed(work, step=1).left() == pytest.approx(9 * 3 + 2 * 200 * 0.01)
    work = Work(steps=10, steps_per_epoch=5, step_tokens=100, keeps_checkpoints=True, trained_bytes=200_000_000)
    assert _timed(work, step=6).left() == pytest.approx(4 * 3 + 1 + 1)
    asks = _timed(Work(steps=10, steps_per_epoch=5, step_tokens=100, layers=10), step=10)
    asks.expect_answers(20, batch=4, tokens=8, prompt=12)
    asks.check_bytes = 400_000_000
    assert asks.left() == pytest.approx(20 * ((12 + 8) * 0.01 + 8 * 10 * 0.5e-3 / 4) + 2)
    exports = _timed(Work(steps=10, steps_per_epoch=5, step_tokens=100), step=9)
    exports.expect_exports(bytes=600_000_000, tokens=400)
    assert exports.left() == pytest.approx(3 + 3 + 400 * 0.01)
    assert exports.exports_left() == pytest.approx(3 + 400 * 0.01)


def test_what_was_measured_takes_the_estimates_place() -> None:
    work = Work(steps=7, steps_per_epoch=7, step_tokens=100, every=2, valid_tokens=200, keeps_checkpoints=True)
    timed = _timed(work, step=3)
    timed.expect_answers(4, batch=4, tokens=8, prompt=12)
    parts: dict[step_timer.Part, float] = {"validation": 5.0, "checkpoint": 7.0, "answer": 11.0}
    for part, seconds in parts.items():
        timed.note(part, seconds)
    # Validation runs after the steps 4, 6 and 7, the last.
    assert timed.left() == pytest.approx(4 * 3 + 3 * 5 + 7 + 4 * 11)
    timed.note("step", 5.0)
    assert timed.left() == pytest.approx(4 * 4 + 3 * 5 + 7 + 4 * 11)


def test_general_benchmark_is_counted_by_its_tokens() -> None:
    timed = _timed(Work(steps=10, steps_per_epoch=10, step_tokens=100), step=10)
    timed.expect_general(300)
    assert timed.left() == pytest.approx(300 * 0.01)
    with timed.measure("general", 100):
        pass
    timed.note("general", 0.02)
    assert timed.left() == pytest.approx(200 * 0.01, rel=1e-3)  # the mean of zero and 20 ms


def test_nothing_is_said_before_anything_is_known() -> None:
    timed = StepTimer(Work(steps=5, steps_per_epoch=5, step_tokens=100))
    timed.expect_answers(4, batch=4, tokens=8, prompt=12)
    timed.note("answer", 1.0)
    assert timed.left() is None  # a full fine-tune measures its base before the first step
    timed.trained = True
    assert timed.left() == pytest.approx(4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Returns the timer's clock, which only the test advances."""
    now = [0.0]
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_run_says_how_long_answering_and_saving_take(
    tmp_path: Path, tiny: Path, ear: Ear, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(i) for i in range(4)]
    given = Greedy.answer

    def slow(*arguments: Any) -> list[list[int]]:
        clock[0] += 10
        return given(*arguments)

    monkeypatch.setattr(Greedy, "answer", slow)
    monkeypatch.setattr(decoder, "MOST_ROWS", {"cpu": 2})
    evaluation = Evaluation(test_file="file-test", max_new_tokens=4, general=General(enabled=False))
    folder = lay_out(tmp_path / "run", tiny, plan(n_epochs=2, evaluation=evaluation), rows, rows, rows)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    last = said(ear, "step")[-1]
    phases = [(phase.phase, phase.seconds_left) for phase in said(ear, "phase")]
    assert [name for name, _ in phases] == ["loading", "training", *["evaluating"] * 5, "saving"]
    saving = phases[-1][1]
    assert last.seconds_left > saving > 0
    assert [left for _, left in phases[3:7]] == pytest.approx([30 + saving, 20 + saving, 10 + saving, saving])


def test_what_the_parts_took_is_kept_for_later_quotes() -> None:
    made = StepTimer(Work(steps=3, steps_per_epoch=3, step_tokens=100, every=3, valid_tokens=50))
    made.note("answer", 2.0, 3)  # the base's answers, before the training
    made.end_preparation(10.0)
    for step, (seconds, tokens) in enumerate([(9.0, 100), (1.0, 80), (2.0, 120)], start=1):
        made.take_step(step, seconds, tokens)
    made.note("validation", 0.5)
    found = {name: (part.seconds, part.units) for name, part in made.spent().items()}
    assert found == {"prepare": (4, 1), "answer": (6, 3), "step": (12, 3), "validation": (0.5, 50)}
    times = made.step_times  # without the first
    assert (times.steps, times.seconds, times.tokens, times.tokens_squared, times.seconds_tokens) == (
        2, 3, 200, 80**2 + 120**2, 80 + 240,
    )  # fmt: skip
    assert made.step == 3


def test_what_is_measured_inside_a_part_is_none_of_it(clock: list[float]) -> None:
    made = StepTimer(Work(steps=3, steps_per_epoch=3, step_tokens=100))
    with made.measure_rest("scores"):
        clock[0] += 1
        with made.measure("answer", 4):
            clock[0] += 20
        clock[0] += 2
    assert {name: (part.seconds, part.units) for name, part in made.spent().items() if name != "prepare"} == {
        "answer": (20, 4),
        "scores": (3, 1),
    }
