"""Decides whether a snapshot is of the same run: equal options that affect training, base and rows.

A snapshot may be older than the release that reads it. Its plan is read as a current plan, so options that it lacks
have their defaults; options that do not affect the weights are left out.
"""

import json
from typing import Any

from pydantic import ValidationError

from tunery.planning.precision import Precision
from tunery.spec import Plan, Run
from worker.trainer.data import Rows

_WIDE = ["float32", "float32"]
_CHANGES_NO_WEIGHT: Any = {
    "learning_rate_multiplier": True,  # learning_rate is the result
    "evaluation": {"test_file", "max_new_tokens", "max_rows", "general", "unquantised"},
    "keep_checkpoints": True,
    "export": True,
    "columns": True,  # the rows that result are compared
    "gate": True,
    "resources": True,  # a snapshot is whole, whichever ranks saved it; other ranks only sum in another order
}
_FORMAT_1: dict[str, tuple[str, ...]] = {
    "schedule": ("type", "warmup_ratio", "min_ratio"),
    "max_seq_length": (),
    "packing": (),
    "weight_decay": (),
    "max_grad_norm": (),
    "seed": (),
    "early_stopping": ("patience", "min_delta"),
    "select": (),
    "evaluation": ("every_steps", "test_file", "max_new_tokens", "max_rows"),
    "resources": ("gpus",),
    "technique": (
        "type", "r", "alpha", "dropout", "target_modules", "quant_type", "double_quant", "compute_dtype",
    ),
    "n_epochs": (),
    "batch_size": (),
    "learning_rate": (),
    "learning_rate_multiplier": (),
}  # fmt: skip
"""A plan's options, and their own options, in the order in which format 1 hashed them."""


def describe(run: Run, rows: Rows, precision: Precision) -> dict[str, Any]:
    """Returns the description of its run that a snapshot holds."""
    return {
        "plan": run.plan.model_dump(mode="json"),
        "base_model": run.base_model,
        "rows": rows.sha256,
        "learning_in": _learning_in(precision),
    }


def difference(run: Run, rows: Rows, precision: Precision, state: dict[str, Any]) -> str | None:
    """Returns why the snapshot with this `state.json` cannot continue as this run; None if it can."""
    old, learning_in = state["run"], _learning_in(precision)
    if isinstance(old, str):
        is_same = old == _format_1(run, rows) and learning_in == _WIDE
        return None if is_same else "it belongs to another plan or other rows"
    if old["base_model"] != run.base_model:
        return f"it belongs to the base {old['base_model']}"
    if old["rows"] != rows.sha256:
        return "it belongs to other rows"
    if old.get("learning_in", _WIDE) != learning_in:
        return "it belongs to a run that keeps its weights and moments in other types"
    try:
        then = _that_train(type(run.plan).model_validate(old["plan"]))
    except ValidationError as error:
        return f"this release cannot read its plan ({error.error_count()} errors)"
    now = _that_train(run.plan)
    changed = sorted(name for name in then | now if then.get(name) != now.get(name))
    return f"it belongs to a plan with another {', '.join(changed)}" if changed else None


def _learning_in(precision: Precision) -> list[str]:
    """Returns the types of the trained weights and the optimizer's moments, which a snapshot holds unchanged."""
    return [precision.trained, precision.moments]


def _that_train(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json", exclude=_CHANGES_NO_WEIGHT)


def _format_1(run: Run, rows: Rows) -> str | None:
    """Returns format 1's hash of this run; None if such a snapshot cannot be of this run.

    With format 1, a packed run counted its steps in sequences, not in rows.
    """
    plan = run.plan.model_dump(mode="json")
    known = {name: _only(plan[name], inner) for name, inner in _FORMAT_1.items()}
    if run.plan.packing or _that_train(type(run.plan).model_validate(known)) != _that_train(run.plan):
        return None
    return rows.digest(json.dumps([known, run.base_model]).encode())


def _only(value: Any, names: tuple[str, ...]) -> Any:
    return {name: value[name] for name in names if name in value} if isinstance(value, dict) else value
