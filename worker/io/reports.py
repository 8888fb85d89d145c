"""Reports of files: made by a process of their own, whose memory goes with it, and kept in storage."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tunery import db, processes
from tunery.datasets import reports
from tunery.datasets.model import FileReport
from tunery.datasets.report.order import Order, OtherFile
from tunery.db import UNREACHABLE
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import Storage
from tunery.storage.errors import ObjectMissing, StorageFailed
from tunery.wire import EXIT_USER_ERROR
from worker.io.claims import take_one
from worker.supervisor.drain import Drain
from worker.supervisor.process import ROOT, environment
from worker.supervisor.staging import text_folder

log = logging.getLogger(__name__)

SECONDS = 1800
"""A report's time: nobody waits longer for one."""
_BENCHMARK = "worker/trainer/general/data"
_RESULTS = ("report.json", "digests")


def report_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """One report; whether there was one."""
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
    settings.runs_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".reporting-", dir=settings.runs_dir))
    try:
        _lay_out(report, folder, settings, storage)
        reason = _run(report_id, folder, drain)
        if drain.begun:
            _release(report_id)
        else:
            _settle(report, folder, storage, reason)
    except (StorageFailed, *UNREACHABLE):
        _release(report_id)
        raise  # another time
    except Exception as error:  # a fault of ours, which must not keep every later report from its turn
        log.exception("%s could not be made", report_id)
        _settle(report, folder, storage, f"The report could not be made: {type(error).__name__}.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _release(report_id: str) -> None:
    with db.transaction() as session:
        reports.release(session, report_id)


def _lay_out(report: FileReport, folder: Path, settings: Settings, storage: Storage) -> None:
    """Fills the folder of the process with the files that the report is about."""
    with db.transaction() as session:
        contents = {"rows": report.sha256, "against": report.against}
        found = {name: reports.content(session, report.project_id, sha256) for name, sha256 in contents.items()}
        base = session.get_one(Model, report.base) if report.base else None
        others = reports.others(session, report) if not report.against and not report.base else []
    for name, sha256 in contents.items():
        if sha256:
            file = found[name]
            if file is None:
                raise ObjectMissing(key=sha256)
            storage.fetch(file.key, folder / name, sha256)
    if base is not None:
        (folder / "base").symlink_to(text_folder(settings.models_dir, storage, base).absolute())
    (folder / "others").mkdir()
    for file, other in others:
        data = b"".join(storage.read(f"{other.prefix}/digests"))
        (folder / "others" / file.id).write_bytes(data)
    named = [OtherFile(id=file.id, name=file.filename) for file, _ in others]
    order = Order(
        compares=bool(report.against), base=report.base or None, others=named, benchmark=str(ROOT / _BENCHMARK)
    )
    if base is not None:
        order.max_tokens = min(order.max_tokens, base.facts.get("context_length") or order.max_tokens)
    (folder / "order.json").write_text(order.model_dump_json())


def _run(report_id: str, folder: Path, drain: Drain) -> str | None:
    """Spawns the process; why it made no report, or None. A worker that shuts down ends it."""
    errors_path = folder / "errors.txt"
    deadline = time.monotonic() + SECONDS
    with errors_path.open("wb") as errors:
        process = processes.spawn(
            [sys.executable, "-m", "tunery.datasets.report", folder],
            output=errors,
            cwd=ROOT,
            env=environment((), str(folder)),
            death_signal=signal.SIGKILL,
        )
        while (status := _status(process)) is None:
            _show_progress(report_id, folder / "progress")
            if drain.begun or time.monotonic() > deadline:
                process.kill()
    return None if status == 0 else _explain(status, errors_path, is_late=time.monotonic() > deadline)


def _status(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _show_progress(report_id: str, path: Path) -> None:
    if path.exists():
        with db.transaction() as session:
            reports.show_progress(session, report_id, float(path.read_text()))


def _explain(status: int, errors_path: Path, *, is_late: bool) -> str:
    if is_late:
        return f"The report took more than {SECONDS // 60} minutes. Split the file."
    if status == EXIT_USER_ERROR:
        return processes.tail(errors_path, 1)
    said = processes.tail(errors_path, 50)
    log.error("the report ended with status %s: %s", status, said or "(nothing)")
    last = said.rpartition("\n")[2] or f"it ended with status {status} and said nothing"
    return f"The report broke: {last.rstrip('.')}. The I/O worker's log has more."


def _settle(report: FileReport, folder: Path, storage: Storage, reason: str | None) -> None:
    """Stores what was made, then the row says so. A report whose file went meanwhile leaves nothing."""
    summary = None
    if reason is None:
        for name in _RESULTS:
            storage.put_file(f"{report.prefix}/{name}", folder / name)
        summary = json.loads((folder / "summary.json").read_text())
    with db.transaction() as session:
        row = session.get(FileReport, report.id, with_for_update=True)
        if row is not None:
            reports.finish(session, row, summary=summary, error=reason)
    if row is None:
        reports.remove_objects(storage, report.prefix)
