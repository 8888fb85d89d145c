"""What must be equal for a snapshot to be of the same run: the options that change training, the base and the rows.

A snapshot may be older than the release that reads it. Its plan is read as a plan of today, so an option that it does
not know has its default; options that change no weight are left out.
"""

import json
from typing import Any

from pydantic import ValidationError

from tunery.planning.precision import Precision
from tunery.spec import Plan, Run
from worker.trainer.data import Rows

_WIDE = ["float32", "float32"]
_CHANGES_NO_WEIGHT: Any = {
    "learning_rate_multiplier": True,  # learning_rate is what it came to
    "evaluation": {"test_file", "max_new_tokens", "max_rows", "general", "unquantised"},
    "keep_checkpoints": True,
    "export": True,
    "columns": True,  # the rows that they make are compared
    "gate": True,
    "resources": True,  # a snapshot is whole, on whatever ranks it was saved: others sum the same in another order
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
"""A plan's options, and theirs, in the order in which format 1 hashed them."""


def describe(run: Run, rows: Rows, precision: Precision) -> dict[str, Any]:
    """Returns what a snapshot says of its run."""
    return {
        "plan": run.plan.model_dump(mode="json"),
        "base_model": run.base_model,
        "rows": rows.sha256,
        "learning_in": _learning_in(precision),
    }


def difference(run: Run, rows: Rows, precision: Precision, state: dict[str, Any]) -> str | None:
    """Returns why the snapshot of this `state.json` cannot be continued as this run; None where it can."""
    old, learning_in = state["run"], _learning_in(precision)
    if isinstance(old, str):
        return None if old == _format_1(run, rows) and learning_in == _WIDE else "it is of another plan or other rows"
    if old["base_model"] != run.base_model:
        return f"it is of the base {old['base_model']}"
    if old["rows"] != rows.sha256:
        return "it is of other rows"
    if old.get("learning_in", _WIDE) != learning_in:
        return "it is of a run whose weights and moments are kept in other types"
    try:
        then = _that_train(type(run.plan).model_validate(old["plan"]))
    except ValidationError as error:
        return f"its plan is none of this release's ({error.error_count()} errors)"
    now = _that_train(run.plan)
    changed = sorted(name for name in then | now if then.get(name) != now.get(name))
    return f"it is of a plan with another {', '.join(changed)}" if changed else None


def _learning_in(precision: Precision) -> list[str]:
    """What the weights that learn and the optimizer's moments are kept in: a snapshot holds both as they are."""
    return [precision.trained, precision.moments]


def _that_train(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json", exclude=_CHANGES_NO_WEIGHT)


def _format_1(run: Run, rows: Rows) -> str | None:
    """Returns the hash that format 1 had of this run; None where it could not have been of this run.

    A packed run of that time counted its steps in sequences, not in rows.
    """
    plan = run.plan.model_dump(mode="json")
    known = {name: _only(plan[name], inner) for name, inner in _FORMAT_1.items()}
    if run.plan.packing or _that_train(type(run.plan).model_validate(known)) != _that_train(run.plan):
        return None
    return rows.digest(json.dumps([known, run.base_model]).encode())


def _only(value: Any, names: tuple[str, ...]) -> Any:
    return {name: value[name] for name in names if name in value} if isinstance(value, dict) else value
