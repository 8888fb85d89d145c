"""Measures a base's loss on a file's answers, for the file's report, in a separate process on this host's CPU."""

import logging
from pathlib import Path

from tunery.datasets.report.order import Order
from tunery.models.model import Model
from tunery.rows.answer_losses import MOST_PARAMS, PlausibilityOrder
from tunery.settings import Settings
from tunery.storage import Storage
from worker.io import programs
from worker.supervisor.drain import Drain
from worker.supervisor.staging import base_folder

log = logging.getLogger(__name__)

MOST_ROWS = 5000
SECONDS = 600.0


def measure(folder: Path, base: Model, report: Order, settings: Settings, storage: Storage, drain: Drain) -> None:
    """Writes losses.json into a report's folder; the report goes on without it if the base cannot run here."""
    if base.model_info.get("params", MOST_PARAMS + 1) > MOST_PARAMS:
        return
    weights = base_folder(settings.models_dir, storage, base.prefix, base.manifest_sha256 or "")
    (folder / "weights").symlink_to(weights.absolute())
    order = PlausibilityOrder(
        max_tokens=report.max_tokens, most_rows=MOST_ROWS, seconds=SECONDS, columns=report.columns
    )
    (folder / "plausibility.json").write_text(order.model_dump_json())
    reason = programs.run(
        ["worker.trainer.plausibility", str(folder)], folder, drain, what="scoring of the answers", seconds=2 * SECONDS
    )
    if reason is not None:
        log.warning("a report is made without the losses of %s: %s", base.id, reason)
