"""Reports on uploaded files: made once per content, kept, shown to the owner, and removed with the file."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.datasets import files, reports
from tunery.datasets.model import File, FileEvent, FileReport
from tunery.spec import Columns
from worker.io import programs
from worker.io import reports as io_reports
from worker.supervisor.drain import Drain

PLAIN = b'{"note": "no training row"}\n' * 12


@pytest.fixture
def report_all(workshop: Workshop) -> Callable[[], int]:
    """Returns a function that makes all queued reports and returns their number."""
    settings = workshop.settings.model_copy(update={"file_reports": True})

    def work() -> int:
        made = 0
        while io_reports.report_next(settings, workshop.storage, Drain()):
            made += 1
        return made

    return work


def _rows(workshop: Workshop, kind: type[Any]) -> list[Any]:
    with workshop.session() as session:
        return list(session.scalars(select(kind).order_by(kind.created_at)))


def _stored(workshop: Workshop, report: FileReport) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(b"".join(workshop.storage.read(f"{report.prefix}/report.json")))
    return found


def test_a_content_is_read_once_and_every_file_with_it_reports_it(
    workshop: Workshop, report_all: Callable[[], int]
) -> None:
    first = workshop.file(training_rows(12) + training_rows(1))
    assert report_all() == 1
    second = workshop.file(training_rows(12) + training_rows(1))
    assert report_all() == 0
    (report,) = _rows(workshop, FileReport)
    assert (report.status, report.progress, report.summary["rows"]) == ("ready", 1.0, 13)
    assert report.summary["counts"]["exact_duplicate"] == 1
    found = _stored(workshop, report)
    assert [finding["lines"] for finding in found["findings"] if finding["kind"] == "exact_duplicate"] == [[1, 13]]
    events = [(event.file_id, event.outcome, event.data["findings"]) for event in _rows(workshop, FileEvent)]
    assert events == [(id, "processed", len(found["findings"])) for id in (first, second)]


def test_a_file_that_no_job_can_take_says_why(workshop: Workshop, report_all: Callable[[], int]) -> None:
    broken = training_rows(300) + b'{"messages": [{"role": "wizard", "content": "x"}]}\n'
    file_id = workshop.file(broken)
    assert report_all() == 1
    (file,), (event,) = _rows(workshop, File), _rows(workshop, FileEvent)
    assert (file.id, file.status, event.outcome) == (file_id, "error", "failed")
    assert "wizard" in file.status_details
    assert "301" in file.status_details


def test_rows_of_another_file_of_the_project_are_named(workshop: Workshop, report_all: Callable[[], int]) -> None:
    known = workshop.file(training_rows(12, first=100))
    report_all()
    workshop.file(training_rows(12) + training_rows(2, first=105))
    report_all()
    _, report = _rows(workshop, FileReport)
    (finding,) = [one for one in _stored(workshop, report)["findings"] if one["kind"] == "repeated_elsewhere"]
    assert (finding["lines"], finding["against"]) == ([13, 14], [6, 7])
    assert known in finding["why"]


@pytest.mark.parametrize(("version", "against"), [(7, []), (8, [4])])
def test_lines_of_another_table_are_named_by_reports_that_know_them(
    workshop: Workshop, report_all: Callable[[], int], version: int, against: list[int]
) -> None:
    workshop.file(b'prompt,completion\n"Who\ncomes?",Ada.\nWhere?,There.\n')
    report_all()
    with workshop.session() as session:
        session.scalars(select(FileReport)).one().version = version
    workshop.file(b"prompt,completion\nWhen?,Now.\nWhere?,There.\n")
    report_all()
    _, report = _rows(workshop, FileReport)
    (finding,) = [one for one in _stored(workshop, report)["findings"] if one["kind"] == "repeated_elsewhere"]
    assert (finding["lines"], finding.get("against", [])) == ([3], against)


def test_a_report_goes_with_the_last_file_of_its_content(workshop: Workshop, report_all: Callable[[], int]) -> None:
    uploaded = [workshop.file(training_rows(12)) for _ in range(2)]
    report_all()
    (report,) = _rows(workshop, FileReport)
    for file_id, left in zip(uploaded, (1, 0), strict=True):
        with workshop.session() as session:
            files.delete(session, session.get_one(File, file_id), in_use_by=None)
            files.purge(session, workshop.storage, lambda *_: None)
        assert len(_rows(workshop, FileReport)) == left
        assert bool(list(workshop.storage.list(f"{report.prefix}/"))) is bool(left)


def test_a_report_of_a_file_that_went_meanwhile_leaves_nothing(
    workshop: Workshop, report_all: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = workshop.file(training_rows(12))
    lay_out = io_reports._lay_out

    def lay_out_and_delete(*arguments: Any) -> Any:
        made = lay_out(*arguments)
        with workshop.session() as session:
            files.delete(session, session.get_one(File, file_id), in_use_by=None)
            files.purge(session, workshop.storage, lambda *_: None)
        return made

    monkeypatch.setattr(io_reports, "_lay_out", lay_out_and_delete)
    report_all()
    assert _rows(workshop, FileReport) == []
    assert list(workshop.storage.list("reports/")) == []


def test_a_report_that_kills_its_process_fails_alone(
    workshop: Workshop, report_all: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = subprocess.Popen

    def spawn_and_kill(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        child = spawn(*arguments, **options)
        os.kill(child.pid, signal.SIGKILL)
        return child

    monkeypatch.setattr(programs.subprocess, "Popen", spawn_and_kill)
    workshop.file(training_rows(12))
    assert report_all() == 1
    (report,), (event,), (file,) = (_rows(workshop, kind) for kind in (FileReport, FileEvent, File))
    assert (report.status, event.outcome, file.status) == ("failed", "processed", "processed")
    assert "it was killed by signal 9 (the host may have run out of memory)" in report.error


def test_a_worker_that_stops_gives_the_report_back(workshop: Workshop) -> None:
    drain = Drain()
    drain.begin()
    workshop.file(training_rows(12))
    settings = workshop.settings.model_copy(update={"file_reports": True})
    assert io_reports.report_next(settings, workshop.storage, drain)
    (report,) = _rows(workshop, FileReport)
    assert (report.status, report.tries) == ("queued", 0)


def test_a_report_that_ends_its_workers_fails(workshop: Workshop) -> None:
    workshop.file(training_rows(12))
    (report,) = _rows(workshop, FileReport)
    for tries in range(1, reports.MAX_TRIES + 1):
        with workshop.session() as session:
            begun = reports.begin(session, report.id)
            assert begun is not None
            assert begun.tries == tries
    with workshop.session() as session:
        assert reports.begin(session, report.id) is None
        assert "stopped 3 times" in str(session.get_one(FileReport, report.id).error)


def test_a_worker_for_io_makes_reports_by_itself(workshop: Workshop) -> None:
    workshop.start("io", TUNERY_FILE_REPORTS="true")
    workshop.file(training_rows(12))
    workshop.until(lambda: [row.status for row in _rows(workshop, FileReport)] == ["ready"], "the report is there")


TABLE = "".join(["Frage,Antwort\n", *(f"Was kommt nach {i}?,{i + 1}\n" for i in range(12))]).encode()
NAMED = Columns(prompt="Frage", completion="Antwort")


@pytest.mark.parametrize("names", ["Frage,Antwort", pytest.param("prompt,completion", marks=pytest.mark.slow)])
def test_a_report_reads_both_files_by_the_columns_that_are_named(
    names: str, workshop: Workshop, report_all: Callable[[], int]
) -> None:
    """The other file by its own names if it has none of these columns. The base scores the same rows."""
    other = TABLE.splitlines(keepends=True)[3:5]
    ids = [workshop.file(TABLE), workshop.file(names.encode() + b"\n" + b"".join(other))]
    with workshop.session() as session:
        file, against = (session.get_one(File, id) for id in ids)
        asked = reports.request(session, file, base=workshop.base_id, against=against.sha256, columns=NAMED).id
    assert report_all() == 3
    with workshop.session() as session:
        report = session.get_one(FileReport, asked)
    assert (report.status, report.error, report.summary["examples"]) == ("ready", None, 12)
    found = _stored(workshop, report)
    assert sorted(one["lines"] for one in found["findings"] if one["kind"] == "test_leak") == [[4], [5]]
    assert found["figures"]["tokens"]["spreads"]["row"]["count"] == 12
    assert found["figures"]["answers"]["judged"] == 12
    assert "invalid_row" not in report.summary["counts"]


@pytest.mark.slow
def test_rows_that_are_read_by_columns_are_compared_with_other_files(
    workshop: Workshop, report_all: Callable[[], int]
) -> None:
    """In both directions: a file's rows are those of its report by columns, if there is one."""
    rows = TABLE.splitlines(keepends=True)
    ids = [workshop.file(TABLE), workshop.file(b"prompt,completion\n" + b"".join(rows[5:8]))]
    assert report_all() == 2
    with workshop.session() as session:
        table = reports.request(session, session.get_one(File, ids[0]), columns=NAMED).id
    assert report_all() == 1
    ids.append(workshop.file(b"question,answer\n" + rows[2]))
    assert report_all() == 1
    found = {report.id: _stored(workshop, report)["findings"] for report in _rows(workshop, FileReport)}
    last = _rows(workshop, FileReport)[-1].id
    elsewhere = {
        id: [(one["lines"], one["against"]) for one in findings if one["kind"] == "repeated_elsewhere"]
        for id, findings in found.items()
    }
    assert (elsewhere[table], elsewhere[last]) == ([([6, 7, 8], [2, 3, 4])], [([2], [3])])


def test_a_content_is_compared_by_its_report_with_most_rows(workshop: Workshop) -> None:
    """One report of each content, also if it was read by columns that it lacks, and if several files have it."""
    asking, table, older = (workshop.file(data) for data in (training_rows(12), TABLE, training_rows(13)))
    workshop.file(TABLE)
    wrong, empty = Columns(prompt="Fragen", completion="Antworten"), {"usable": {"rows": 0}}
    with workshop.session() as session:
        file = session.get_one(File, table)
        by_columns = [reports.request(session, file, columns=columns) for columns in (None, NAMED, wrong)]
        for report in session.scalars(select(FileReport)):
            rows = {"usable": {"rows": 12}} if report.columns == NAMED.named else empty
            reports.finish(session, report, summary={"trainable": True, "reason": None, **rows})
        session.flush()
        asked = session.get_one(File, asking)
        found = reports.others(session, asked.project_id, asked.sha256, most=2)
        assert {one.sha256 for one, _ in found} == {file.sha256, session.get_one(File, older).sha256}
        assert by_columns[1] in [report for _, report in found]


@pytest.mark.slow
def test_another_report_counts_by_a_base_and_compares_with_a_file(
    workshop: Workshop, report_all: Callable[[], int]
) -> None:
    ids = [workshop.file(training_rows(12)), workshop.file(training_rows(3, first=10))]
    with workshop.session() as session:
        file, other = (session.get_one(File, id) for id in ids)
        asked = reports.request(session, file, base=workshop.base_id, against=other.sha256).id
    assert report_all() == 3
    with workshop.session() as session:
        report = session.get_one(FileReport, asked)
    assert (report.status, report.error) == ("ready", None)
    found = _stored(workshop, report)
    assert found["figures"]["tokens"]["base"] == workshop.base_id
    assert found["figures"]["tokens"]["spreads"]["row"]["count"] == 12
    assert sorted(one["lines"] for one in found["findings"] if one["kind"] == "test_leak") == [[11], [12]]
    assert found["figures"]["answers"]["judged"] == 12
    assert len(_rows(workshop, FileEvent)) == 2, "every file has an event of its report"
