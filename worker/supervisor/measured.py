"""Measurements in a trainer's messages, under their names in `job_metrics`, which trackers get too."""

import math
from typing import Any

from tunery import trainer_protocol as protocol


def of_step(step: protocol.Step) -> dict[str, Any]:
    """Returns a step's row in `job_metrics`."""
    return finite(
        train_loss=step.train_loss,
        train_mean_token_accuracy=step.train_accuracy,
        valid_loss=step.valid_loss,
        valid_mean_token_accuracy=step.valid_accuracy,
        learning_rate=step.learning_rate,
        grad_norm=step.grad_norm,
        epoch=step.epoch,
        tokens=step.tokens,
        seconds=step.seconds,
        **_prefixed("train", step.train_metrics),
        **_prefixed("valid", step.valid_metrics),
    )


def of_evaluation(evaluated: protocol.Evaluated) -> dict[str, Any]:
    """Returns what an evaluation adds to its step's row."""
    return finite(
        full_valid_loss=evaluated.loss,
        full_valid_mean_token_accuracy=evaluated.accuracy,
        task_score=evaluated.task_score,
        **_prefixed("full_valid", evaluated.metrics),
    )


def of_score(score: protocol.Score) -> dict[str, Any]:
    """Returns the scorecard's figures for the base and the tuned model."""
    found: dict[str, float | None] = {"base_exact": score.base_exact, "tuned_exact": score.tuned_exact}
    for name, measure in score.metrics.items():
        found |= {f"base_{name}": measure.base, f"tuned_{name}": measure.tuned}
    if score.general is not None:
        found |= {"base_general": score.general.base_accuracy, "tuned_general": score.general.tuned_accuracy}
    return finite(**{f"scorecard_{name}": value for name, value in found.items()})


def finite(**values: float | None) -> dict[str, Any]:
    """Returns the values that are finite numbers: jsonb has no NaN, and what was not measured is left out."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """Returns a method's own measures under their names in `job_metrics`, such as `train_rewards_margin`."""
    return {f"{prefix}_{name}": value for name, value in metrics.items()}
