"""Asks a base in a folder here how answers end, in a process of its own, as only the trainer imports torch."""

import importlib.util
import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from tunery.datasets.report.case import Ask
from tunery.datasets.report.rows import Row
from tunery.processes import dies_with_parent
from tunery.rows.answer_losses import MOST_PARAMS, AnswerEnd, PlausibilityOrder

log = logging.getLogger(__name__)

MOST_ROWS = 1000
SECONDS = 120.0
_BYTES = 2
"""Of a parameter, at least: bases with narrower weights are not run."""


def asking(base: Path, max_tokens: int) -> Ask | None:
    """Returns what asks the base in this folder; None without its weights or torch, or if it is too large for a CPU."""
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    if not 0 < size <= _BYTES * MOST_PARAMS or importlib.util.find_spec("torch") is None:
        return None
    order = PlausibilityOrder(max_tokens=max_tokens, most_rows=MOST_ROWS, seconds=SECONDS, ends_only=True)
    return partial(_ask, base, order)


def _ask(base: Path, order: PlausibilityOrder, rows: Sequence[Row]) -> Mapping[int, AnswerEnd]:
    """Returns the ends of as many answers as the order's time allows, by line; of none if the base cannot run."""
    with tempfile.TemporaryDirectory(prefix="tunery-") as name:
        folder = Path(name)
        (folder / "weights").symlink_to(base.absolute())
        (folder / "plausibility.json").write_text(order.model_dump_json())
        (folder / "rows").write_text("".join(map(_line, rows)))
        done = subprocess.run(
            [sys.executable, "-m", "worker.trainer.plausibility", name],
            capture_output=True, text=True, check=False, preexec_fn=dies_with_parent(signal.SIGTERM),
        )  # fmt: skip
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            log.warning("The report is made without %s, which does not run here: %s", base, reason)
            return {}
        said = TypeAdapter(list[AnswerEnd]).validate_json((folder / "losses.json").read_bytes())
    return {rows[one.line - 1].line: one for one in said}


def _line(row: Row) -> str:
    return json.dumps({"messages": [{"role": turn.role, "content": turn.text} for turn in row.turns]}) + "\n"
