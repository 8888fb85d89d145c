"""Generates a base's own answers to replay's prompts: rows that keep it from changing elsewhere.

Blocks of prompts are answered in order, each with its own random numbers, until enough answers have ended: a block's
answers depend neither on how many are wanted nor on the number of GPUs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from tunery.planning.precision import Precision
from tunery.rows.template import ChatTemplate
from tunery.trainer_protocol import Phase, Spent
from worker.trainer import generation
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks
from worker.trainer.replay import kept
from worker.trainer.replay.kept import Answers
from worker.trainer.replay.prompts import Prompt, digest
from worker.trainer.report import MessageWriter
from worker.trainer.step_timer import Part
from worker.trainer.stop_signal import StopSignal

TEMPERATURE = 0.7
BLOCK = {"cpu": 16, "cuda": 128}
_VERSION = 1
"""Version of how answers are sampled. With a new one, older files are ignored."""


@dataclass(frozen=True)
class Base:
    """The model that a run starts from, and what is needed to sample its answers. `measured`: what sampling took."""

    folder: Path
    objective: Objective
    template: ChatTemplate
    precision: Precision
    ranks: Ranks
    writer: MessageWriter
    stop_signal: StopSignal
    measured: dict[Part, Spent] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.ranks.device


def answer(base: Base, prompts: list[Prompt], limit: int, enough: Callable[[Answers], bool]) -> Answers:
    """Returns answers of at most `limit` tokens to the first prompts, until they are `enough` or no prompt is left.

    Raises Stopped between blocks; answers so far are kept.
    """
    size = BLOCK[base.device.type]
    key = [_VERSION, digest(prompts), limit, TEMPERATURE, size, asdict(base.precision), base.device.type, _versions()]
    found: Answers = base.ranks.gather(kept.find(base.folder, key, len(prompts)))[
        0
    ]  # a file may appear between two reads
    found = found[: len(found) // size * size] if len(found) < len(prompts) else found
    began, before = time.monotonic(), len(found)
    with _as_base(base):
        while not enough(found) and len(found) < len(prompts):
            base.ranks.check(base.stop_signal)
            base.writer.write(Phase(phase="sampling replay answers"))
            start = len(found) + base.ranks.index * size
            with base.ranks.lockstep():
                mine = _block(base, prompts[start : start + size], limit, seed=start)
            found = found + [text for part in base.ranks.gather(mine) for text in part]
            if base.ranks.is_main:
                kept.write(base.folder, key, found)
    base.measured["replay"] = Spent(seconds=time.monotonic() - began, units=len(found) - before)
    if base.ranks.is_main:
        kept.write(base.folder, key, found)
    base.ranks.wait()
    return found


def count_ended(answers: Answers) -> int:
    """Counts non-empty answers that a stop token ended."""
    return sum(answer is not None for answer in answers)


@contextmanager
def _as_base(base: Base) -> Iterator[None]:
    """Switches off an adapter that the run continues, and keeps the run's own random numbers apart."""
    model: Any = base.objective.model
    base.objective.eval()
    devices = [base.device] if base.device.type == "cuda" else []
    without_adapter = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with torch.random.fork_rng(devices), torch.no_grad(), without_adapter, base.objective.computing():
        yield


def _block(base: Base, prompts: list[Prompt], limit: int, seed: int) -> Answers:
    if not prompts:
        return []
    torch.manual_seed(seed)
    try:
        asked = [prompt.ids for prompt in prompts]
        given = generation.sample(base.objective.causal, base.template, asked, limit, TEMPERATURE)
    except torch.OutOfMemoryError:
        if len(prompts) == 1 or base.objective.is_sharded:  # the other ranks wait in this pass
            raise
        half = len(prompts) // 2
        return _block(base, prompts[:half], limit, seed) + _block(base, prompts[half:], limit, seed + half)
    return [_ended(base.template, ids) for ids in given]


def _ended(template: ChatTemplate, ids: list[int]) -> str | None:
    """Returns an answer's text; None if it is empty or was cut off, which would teach the model not to stop."""
    if template.answer_length(ids) == len(ids):
        return None
    return (template.answer_text(ids).strip() and template.answer_text(ids)) or None


def _versions() -> list[str]:
    return [torch.__version__, transformers.__version__]
