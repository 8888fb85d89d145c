"""Estimates a run's remaining time: its steps, the evaluations and files in between, and what follows the last step.

The time that each part took is kept to the end, for the quotes of later runs.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from tunery.trainer_protocol import Spent, StepTimes

Part = Literal[
    "rows", "replay", "step", "validation", "checkpoint", "answer", "general", "pairs", "scores", "reference",
    "saving", "exports",
]  # fmt: skip

_BYTES_A_SECOND = 200e6
"""Speed of writing or reading weights on a slow disk; the actual speed is soon measured."""
_LAYER_SECONDS = 0.5e-3
"""Time of one layer for one more token of an answer, however few rows are answered at once."""


@dataclass(frozen=True)
class Work:
    """The work of one rank. `every`: steps between two validation losses, None without a validation file.

    `trained_bytes` are written by each checkpoint and by the artifact.
    """

    steps: int
    steps_per_epoch: int
    step_tokens: float
    layers: int = 0
    every: int | None = None
    valid_tokens: float = 0
    keeps_checkpoints: bool = False
    trained_bytes: int = 0


@dataclass
class StepTimer:
    """Measures the parts of a run. A part that has not run yet is estimated from the steps and from its size.

    `step`: the last one taken; `trained`: no more follow. `check_bytes`: read to check the artifact.
    """

    work: Work
    step: int = 0
    trained: bool = False
    check_bytes: int = 0
    _seconds: dict[Part, float] = field(default_factory=dict)
    _times: dict[Part, int] = field(default_factory=dict)
    _answers: int = 0
    _answer_tokens: int = 0
    _answer_batch: int = 1
    _prompt_tokens: float = 0.0
    _general_tokens: int = 0
    _export_bytes: int = 0
    _export_tokens: int = 0
    _spent: dict[Part, Spent] = field(default_factory=dict)
    _step_times: StepTimes = field(default_factory=StepTimes)
    _prepared: float = 0.0

    def end_preparation(self, seconds: float) -> None:
        """Records that training begins after `seconds`; parts measured meanwhile are counted separately."""
        self._prepared = max(0.0, seconds - self._measured())

    def take_step(self, step: int, seconds: float, tokens: int) -> None:
        """Records an optimizer step. The run's first step, which warms up, is not representative."""
        if self._times.get("step"):
            self._step_times = self._step_times.add(seconds, tokens)
        self.note("step", seconds)
        self.step = step

    def spent(self) -> dict[str, Spent]:
        """The time of each part. Units: tokens of the rows that were read, replay answers, steps, validated tokens,
        checkpoints, answers, tokens of the benchmark, of test pairs and of which the reference was measured; for
        scores and exports, how often they were worked on.
        """
        found: dict[str, Spent] = {"prepare": Spent(seconds=self._prepared, units=1)}
        found |= {str(part): spent for part, spent in self._spent.items()}
        if (validation := self._spent.get("validation")) is not None:
            found["validation"] = Spent(seconds=validation.seconds, units=validation.units * self.work.valid_tokens)
        return found

    @property
    def step_times(self) -> StepTimes:
        """The times of all steps but the first."""
        return self._step_times

    def expect_answers(self, answers: int, *, batch: int, tokens: int, prompt: float) -> None:
        """Adds answers of at most `tokens` tokens to prompts of about `prompt`, with `batch` of them at once."""
        self._answers, self._answer_tokens, self._prompt_tokens = answers, tokens, prompt
        self._answer_batch = max(1, min(batch, answers))

    def expect_general(self, tokens: int) -> None:
        """Adds tokens of the general benchmark, which pass through the model once."""
        self._general_tokens += tokens

    def expect_exports(self, *, bytes: int, tokens: int) -> None:
        """Adds exports that read and write `bytes`, and pass `tokens` through whole models."""
        self._export_bytes, self._export_tokens = bytes, tokens

    def add(self, before: Mapping[Part, Spent]) -> None:
        """Records parts that were measured before there was a timer."""
        for part, spent in before.items():
            self._spent[part] = spent

    @contextmanager
    def measure(self, part: Part, count: int = 1) -> Iterator[None]:
        """Measures the time of a part, or of `count` equal ones. If the block raises, it is not counted."""
        began = time.monotonic()
        yield
        self.note(part, (time.monotonic() - began) / max(1, count), max(1, count))
        if part == "answer":
            self._answers = max(0, self._answers - count)
        if part == "general":
            self._general_tokens = max(0, self._general_tokens - count)

    @contextmanager
    def measure_rest(self, part: Part) -> Iterator[None]:
        """Measures a part's time without that of parts measured inside it. If the block raises, it is not counted."""
        began, before = time.monotonic(), self._measured()
        yield
        self.note(part, time.monotonic() - began - (self._measured() - before))

    def _measured(self) -> float:
        return sum(part.seconds for part in self._spent.values())

    def note(self, part: Part, seconds: float, count: int = 1) -> None:
        """Records the time of each of `count` equal parts, weighting recent ones more."""
        before = self._spent.get(part, Spent(seconds=0, units=0))
        self._spent[part] = Spent(seconds=before.seconds + seconds * count, units=before.units + count)
        times = self._times[part] = self._times.get(part, 0) + 1
        mean = self._seconds.get(part, 0.0)
        self._seconds[part] = mean + (seconds - mean) * max(0.05, 1 / times)

    def left(self) -> float | None:
        """Returns the seconds to the end of the run, including what is due after the current step. None if there is no
        basis yet: before the first step and, in a run that was stopped after its last step, before the first answer.
        """
        if not self._seconds.keys() & ({"step", "answer", "general"} if self.trained else {"step"}):
            return None
        general = self._of("general") * self._general_tokens
        after = self._of("answer") * self._answers + general + self._of("saving") + self._of("exports")
        return after if self.trained else after + self._of("step") * (self.work.steps - self.step) + self._between()

    def exports_left(self) -> float:
        """Returns the seconds of the exports, which come last."""
        return self._of("exports")

    def _between(self) -> float:
        """Returns the seconds of the validation losses and checkpoints that are due from the current step on."""
        work, seconds = self.work, 0.0
        if work.every is not None:
            rest = bool(work.steps % work.every)  # the last step has one whatever its number
            seconds += self._of("validation") * (self._due(work.every) + rest)
        if work.keeps_checkpoints:
            seconds += self._of("checkpoint") * self._due(work.steps_per_epoch)
        return seconds

    def _due(self, every: int) -> int:
        return self.work.steps // every - max(0, self.step - 1) // every

    def _of(self, part: Part) -> float:
        return self._seconds[part] if part in self._seconds else self._estimate(part)

    def _estimate(self, part: Part) -> float:
        work = self.work
        # A backward pass takes about as long as two forward passes.
        forward = self._seconds.get("step", 0.0) / max(1.0, work.step_tokens) / 3
        seconds: dict[Part, float] = {
            "step": 0.0,
            "validation": work.valid_tokens * forward,
            "checkpoint": work.trained_bytes / _BYTES_A_SECOND,
            "answer": (self._prompt_tokens + self._answer_tokens) * forward
            + self._answer_tokens * work.layers * _LAYER_SECONDS / self._answer_batch,
            "general": forward,
            "exports": self._export_bytes / _BYTES_A_SECOND + self._export_tokens * forward,
            "saving": (work.trained_bytes + self.check_bytes) / _BYTES_A_SECOND,
        }
        return seconds.get(part, 0.0)
