"""Makes reports of files in a separate process, whose memory is freed with it, and keeps them in storage."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tunery import db
from tunery.datasets import progress, reports
from tunery.datasets.model import File, FileReport
from tunery.datasets.report.order import Order, OtherFile
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import Storage
from tunery.storage.errors import ObjectMissing
from worker.io import plausibility, programs
from worker.io.claims import take_one
from worker.supervisor.drain import Drain
from worker.supervisor.process import ROOT
from worker.supervisor.staging import text_folder

SECONDS = 1800
"""Time limit of a report: nobody waits longer for one."""
_BENCHMARK = "worker/trainer/general/data"
_RESULTS = ("report.json", "digests")


def report_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """Makes one report; returns whether there was one."""
    return settings.file_reports and take_one(
        "report", _waiting, lambda report_id: _report(report_id, settings, storage, drain)
    )


def _waiting() -> list[str]:
    with db.transaction() as session:
        return reports.waiting(session)


def _report(report_id: str, settings: Settings, storage: Storage, drain: Drain) -> None:
    with db.transaction() as session:
        report = reports.begin(session, report_id)
    if report is None:
        return

    def fail(error: Exception) -> None:
        _finish(report, storage, error=f"The report could not be made: {type(error).__name__}.")

    with programs.workplace(settings.runs_dir, "reporting", report_id, fail, partial(_release, report_id)) as folder:
        base, order = _lay_out(report, folder, settings, storage)
        if base is not None:
            plausibility.measure(folder, base, order, settings, storage, drain)
        reason = programs.run(
            ["tunery.datasets.report", str(folder)], folder, drain, what="report", seconds=SECONDS,
            watch=lambda: _show_progress(report_id, folder),
        )  # fmt: skip
        if drain.begun:
            _release(report_id)
        elif reason is None:
            _finish(report, storage, summary=_store(report, folder, storage))
        else:
            _finish(report, storage, error=reason)


def _release(report_id: str) -> None:
    with db.transaction() as session:
        reports.release(session, report_id)


def _lay_out(report: FileReport, folder: Path, settings: Settings, storage: Storage) -> tuple[Model | None, Order]:
    """Fills the process's folder with the files that the report is about; returns the report's base and the order."""
    with db.transaction() as session:
        contents = {"rows": report.sha256, "against": report.against}
        found = {name: reports.content(session, report.project_id, sha256) for name, sha256 in contents.items()}
        base = session.get_one(Model, report.base) if report.base else None
        is_plain = not report.against and not report.base
        others = reports.others(session, report.project_id, report.sha256) if is_plain else []
    for name, sha256 in contents.items():
        if sha256:
            file = found[name]
            if file is None:
                raise ObjectMissing(key=sha256)
            storage.fetch(file.key, folder / name, sha256)
    order = Order(compares=bool(report.against), columns=report.columns)
    lay_out_known(folder, settings, storage, order, base, others)
    return base, order


def lay_out_known(
    folder: Path,
    settings: Settings,
    storage: Storage,
    order: Order,
    base: Model | None,
    others: Sequence[tuple[File, FileReport]],
) -> None:
    """Adds what else the rows are judged by (a base, other files, the benchmark) to the order, and writes it."""
    if base is not None:
        (folder / "base").symlink_to(text_folder(settings.models_dir, storage, base).absolute())
        order.base = base.id
        order.max_tokens = min(order.max_tokens, base.model_info.get("context_length") or order.max_tokens)
    (folder / "others").mkdir()
    for file, other in others:
        data = b"".join(storage.read(f"{other.prefix}/digests"))
        (folder / "others" / file.id).write_bytes(data)
    order.others = [
        OtherFile(id=file.id, name=file.filename, has_lines=reports.has_lines(other)) for file, other in others
    ]
    order.benchmark = str(ROOT / _BENCHMARK)
    (folder / "order.json").write_text(order.model_dump_json())


def _show_progress(report_id: str, folder: Path) -> None:
    fraction = progress.read(folder)
    if fraction is not None:
        with db.transaction() as session:
            reports.show_progress(session, report_id, fraction)


def _store(report: FileReport, folder: Path, storage: Storage) -> dict[str, Any]:
    """Stores the report; returns its summary."""
    for name in _RESULTS:
        storage.put_file(f"{report.prefix}/{name}", folder / name)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def _finish(
    report: FileReport, storage: Storage, *, summary: dict[str, Any] | None = None, error: str | None = None
) -> None:
    """Records the outcome in the row. A report whose file was deleted meanwhile leaves nothing."""
    with db.transaction() as session:
        row = session.get(FileReport, report.id, with_for_update=True)
        if row is not None:
            reports.finish(session, row, summary=summary, error=error)
    if row is None:
        reports.remove_objects(storage, report.prefix)
