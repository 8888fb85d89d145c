"""Scores an adapter of a quantised base on the base as stored: its answers on a server that does not quantise."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from tunery.planning.precision import Precision, decide
from tunery.spec import Lora
from tunery.trainer_protocol import Measure, PrecisionMeasure, Score, UnquantisedScore
from worker.trainer import rope, sharding
from worker.trainer.export import files
from worker.trainer.methods import registry
from worker.trainer.objective import Objective
from worker.trainer.recipes.lora import LORA
from worker.trainer.stepper import Stepper
from worker.trainer.training import Training

log = logging.getLogger(__name__)
_NO_ROOM = "the device has too little memory for the base in {dtype} beside the trained model"
_CUT = "the model is sharded, and no single device can hold the base in {dtype}"


def is_asked(t: Training) -> bool:
    """Whether the scorecard has this part: if it was asked for and the base is quantised."""
    return t.plan.evaluation.unquantised and t.precision.quantised


def measure(
    t: Training, tuned: list[Any], answer: Callable[[Training, bool], list[Any]], score: Callable[..., Score]
) -> UnquantisedScore:
    """Scores base and adapter on the unquantised base, and compares the adapter there with its `tuned` answers.

    `answer(training, base)` returns a model's answers, `score(first, second)` their scorecard. Raises Stopped.
    """
    precision = decide(Lora(), t.device.type)
    if t.shards is not None:
        return _left_out(precision, _CUT)
    answers = _answers(t, precision, answer)
    files.free_memory()
    if answers is None:
        return _left_out(precision, _NO_ROOM)
    base, there = answers
    apart = score(tuned, there).metrics
    measures = {name: _measure(found, apart[name]) for name, found in score(base, there).metrics.items()}
    return UnquantisedScore(scored_in=precision.base, metrics=measures)


def _measure(found: Measure, apart: Measure) -> PrecisionMeasure:
    return PrecisionMeasure(
        **found.model_dump(),
        difference=apart.gain,
        difference_low=apart.low,
        difference_high=apart.high,
        difference_p=apart.p,
    )


def _left_out(precision: Precision, reason: str) -> UnquantisedScore:
    found = UnquantisedScore(scored_in=precision.base, left_out=reason.format(dtype=precision.base))
    log.warning("not scored on the unquantised base: %s", found.left_out)
    return found


def _answers(
    t: Training, precision: Precision, answer: Callable[[Training, bool], list[Any]]
) -> tuple[list[Any], list[Any]] | None:
    """Returns the answers of base and adapter; None, on all ranks, if one of them has no room for the base."""
    try:
        base = LORA.load_base(t.folder / "base", precision, t.device)
    except torch.OutOfMemoryError:
        base = None
    if t.ranks.any(base is None) or base is None:
        return None
    other = _on(t, base, precision)
    return answer(other, True), answer(other, False)


def _on(t: Training, base: PreTrainedModel, precision: Precision) -> Training:
    """Returns the run with its adapter on another base."""
    rope.install(base)
    adapter = t.folder / "adapter"
    model = LORA.prepare(base, t.plan.technique, adapter if adapter.exists() else None)
    objective = Objective(model, precision, registry.make(t.plan.method))
    learned = sharding.parameters_of(objective, None)
    with torch.no_grad():
        for name, parameter in t.parameters.items():
            learned[name].copy_(parameter)
    memory = replace(t.stepper.memory, graphs=False)
    stepper = Stepper(objective, t.optimizer, [], t.rows, t.ranks, memory, t.stepper.group_of)
    found = replace(t, objective=objective, stepper=stepper, precision=precision)
    vars(found)["timer"] = t.timer  # cached in each of the two: the run's estimate continues
    return found
