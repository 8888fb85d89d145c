"""Estimates how long a baseline's models take on a worker's CPU, to warn of those that are too large."""

from collections.abc import Mapping, Sequence
from typing import Any

from tunery.baselines.order import Order
from tunery.models.model import Model
from tunery.planning import speed
from tunery.planning.shape import Shape
from tunery.spec import Full

MODEL_SECONDS = 4 * 3600
"""Time limit of a model, as others wait behind it."""
_TOKENS = 400
"""Assumed tokens of a prompt with its answer, as no row has been read yet."""
_WARNED = 3600
_SIZES = {"hidden_size", "num_hidden_layers", "vocab_size"}


def warnings(order: Order, models: Sequence[Model]) -> list[str]:
    """Returns warnings about models that would take more than an hour."""
    ways = (2 if order.shots == "auto" else len(order.shots)) + (order.retrieval != "none")
    found = []
    for model in models:
        each = _answer_seconds(model.model_info) * ways
        expected = each * (order.max_rows + 1)  # one answer is timed alone, and more only if they take seconds
        if expected > _WARNED:
            found.append(_say(model, expected, max(1, int(_WARNED / each) - 1)))
    return found


def _answer_seconds(model_info: Mapping[str, Any]) -> float:
    """A full fine-tune's token costs six operations a weight, and a forward pass two."""
    if not model_info.keys() >= _SIZES:
        return 0.0
    return _TOKENS * speed.operations(Shape.of(model_info), Full()) / 3 / speed.CPU_OPERATIONS


def _say(model: Model, expected: float, rows: int) -> str:
    return (
        f"'{model.id}' runs on the CPU of the I/O worker, which takes about {expected / 3600:.0f} hours; the limit is "
        f"{MODEL_SECONDS // 3600}. Set max_rows to {rows} for about an hour, or choose a smaller model."
    )
