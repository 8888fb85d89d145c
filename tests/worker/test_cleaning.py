"""Cleaning of uploaded files: the result is a new file with its lineage."""

import json
from pathlib import Path
from typing import Any

import pytest
from lined_table import INVALID, MAIL, NEXT_LINE, WITH_BREAKS, table
from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.datasets import cleanings, files, progress
from tunery.datasets import reports as file_reports
from tunery.datasets.cleaning.order import Action, Cleaning, HeldOut, RowChoice
from tunery.datasets.model import File, FileCleaning, FileReport
from tunery.datasets.report.case import Finding
from tunery.datasets.report.maker import Report
from tunery.datasets.rules import check_examples
from tunery.errors import InvalidValue
from tunery.rows.encoding import find_encoder
from tunery.spec import Columns, Supervised
from tunery.storage.errors import StorageFailed
from worker.io import cleaning, programs, reports
from worker.supervisor.drain import Drain


def _content(workshop: Workshop, file_id: str) -> bytes:
    return b"".join(workshop.storage.read(f"files/{file_id}"))


def _row(workshop: Workshop, kind: type[Any], id: str) -> Any:
    with workshop.session() as session:
        return session.get_one(kind, id)


def _ask(workshop: Workshop, source: str, order: Cleaning, against: str | None = None, base: str | None = None) -> str:
    with workshop.session() as session:
        other = session.get_one(File, against) if against else None
        return cleanings.request(session, session.get_one(File, source), order, against=other, base=base).id


def _work(workshop: Workshop) -> bool:
    return cleaning.clean_next(workshop.settings, workshop.storage, Drain())


def _dropped(workshop: Workshop, made: str) -> dict[int, str]:
    """Returns why each row was dropped, as a kind of finding, by its line."""
    outcome = _row(workshop, FileCleaning, made).outcome
    assert outcome is not None, _row(workshop, File, made).status_details
    return {one["line"]: one["kind"] for one in outcome["dropped"]}


def test_a_new_file_has_its_lineage_and_the_source_stays(workshop: Workshop) -> None:
    rows = training_rows(40) + training_rows(1) + b'{"messages": [{"role": "user", "content": "x"}]}\n'
    source, test = workshop.file(rows), workshop.file(training_rows(3, first=10))
    made = _ask(workshop, source, Cleaning(recommended=True, held_out=HeldOut(share=0.2)), test)
    with workshop.session() as session:
        assert files.next_unprocessed(session) is None
    assert _row(workshop, File, made).status == "uploaded"

    assert _work(workshop)
    assert not _work(workshop)

    assert _content(workshop, source) == rows
    row, lineage = _row(workshop, File, made), _row(workshop, FileCleaning, made)
    held = _row(workshop, File, lineage.held_out_id)
    assert (row.status, held.status) == ("processed", "processed")
    assert (row.filename, held.filename) == ("rows-clean.jsonl", "rows-held-out.jsonl")
    assert lineage.outcome["source_sha256"] == _row(workshop, File, source).sha256
    kinds = _dropped(workshop, made)
    assert {line: kinds.get(line) for line in (11, 12, 13, 41, 42)} == {
        **dict.fromkeys((11, 12, 13), "test_leak"),
        41: "exact_duplicate",
        42: "wrong_roles",
    }
    left = [line for number, line in enumerate(rows.splitlines(), 1) if number not in kinds]
    kept, apart = (_content(workshop, id).splitlines() for id in (made, held.id))
    assert sorted(kept + apart) == sorted(left)
    assert row.bytes == len(_content(workshop, made))
    assert len(apart) == lineage.outcome["counts"]["held_out"] > 0

    with workshop.session() as session:
        files.delete(session, session.get_one(File, made), in_use_by=None)
        assert files.purge(session, workshop.storage, lambda *_: None) == 1
    assert _row(workshop, FileCleaning, made).outcome["dropped"] == []


def test_a_cleaning_that_leaves_nothing_says_so(workshop: Workshop) -> None:
    bad = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    made = _ask(workshop, workshop.file(bad), Cleaning(recommended=True))
    assert _work(workshop)
    row = _row(workshop, File, made)
    assert (row.status, row.bytes) == ("error", 0)
    assert "would remove all" in row.status_details


def test_a_cleaning_over_which_workers_end_fails(workshop: Workshop) -> None:
    made = _ask(workshop, workshop.file(training_rows(12)), Cleaning(recommended=True))
    for _ in range(cleanings.MAX_TRIES):
        with workshop.session() as session:
            assert cleanings.begin(session, made) is not None
    assert _work(workshop)
    assert "stopped 3 times" in _row(workshop, File, made).status_details
    assert not _work(workshop)


def _asked(question: str, answer: str = "That one.") -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}).encode() + b"\n"


def test_rows_are_judged_by_a_base_by_other_files_and_by_the_benchmark(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = next(iter((reports.ROOT / reports._BENCHMARK).glob("*.jsonl"))).read_text().splitlines()
    question = json.loads(items[0])["question"]
    rows = training_rows(12) + _asked(question) + _asked("Say much.", "word " * 300) + training_rows(2, first=50)
    source, _ = workshop.file(rows), workshop.file(training_rows(9, first=50))
    settings = workshop.settings.model_copy(update={"file_reports": True})
    while reports.report_next(settings, workshop.storage, Drain()):
        pass
    fractions: list[float | None] = []
    run = programs.run

    def run_and_look(arguments: list[str], folder: Path, *rest: Any, **options: Any) -> str | None:
        reason = run(arguments, folder, *rest, **options)
        fractions.append(progress.read(folder))
        return reason

    monkeypatch.setattr(cleaning.programs, "run", run_and_look)
    kinds = ("repeated_elsewhere", "benchmark_overlap", "answer_cut")
    order = Cleaning(actions=[Action(kind=kind, action="drop") for kind in kinds])
    made = _ask(workshop, source, order, base=workshop.base_id)
    assert _work(workshop)

    lineage = _row(workshop, FileCleaning, made)
    assert _dropped(workshop, made) == {
        13: "benchmark_overlap",
        14: "answer_cut",
        15: "repeated_elsewhere",
        16: "repeated_elsewhere",
    }
    assert lineage.progress == 1.0
    assert fractions[0] is not None
    assert 0.6 < fractions[0] <= 1.0


def test_answers_that_a_base_found_implausible_go(workshop: Workshop) -> None:
    """The base's report names them: those that are certain enough go, and none while the report is not ready."""
    source = workshop.file(training_rows(12))
    order = Cleaning(actions=[Action(kind="implausible_output", action="drop", min_score=0.5)])
    with workshop.session() as session:
        report = file_reports.request(session, session.get_one(File, source), base=workshop.base_id)
        id, prefix = report.id, report.prefix
    with pytest.raises(InvalidValue, match="when the report is ready"):
        _ask(workshop, source, order, base=workshop.base_id)
    found = [
        Finding("implausible_output", [line], score, "Is odd.", "Read it.") for line, score in ((3, 0.9), (5, 0.1))
    ]
    found.append(Finding("pii", [7], 1.0, "Has a number.", "Redact it."))
    workshop.storage.put(f"{prefix}/report.json", Report(12, found).as_json().encode())
    with workshop.session() as session:
        file_reports.finish(session, session.get_one(FileReport, id), summary={})

    made = _ask(workshop, source, order, base=workshop.base_id)
    assert _work(workshop)
    assert _row(workshop, FileCleaning, made).outcome["dropped"] == [
        {"line": 3, "kind": "implausible_output", "why": "Is odd."}
    ]


def test_a_table_is_cleaned_by_named_columns_and_keeps_them(workshop: Workshop) -> None:
    """The base counts and compares the same rows, and its findings are those of the report by the same columns."""
    names, named = "Frage,Antwort,Nr", Columns(prompt="Frage", completion="Antwort")
    lines = [f"Was kommt nach {i}?,{i + 1},{i}" for i in range(14)]
    long = f"Wie weit ist es?,{'weit ' * 300},14"
    source = workshop.file("\n".join([names, *lines, long]).encode())
    test = workshop.file("\n".join([names, lines[4]]).encode())
    kinds = ("test_leak", "answer_cut", "implausible_output")
    actions = [Action(kind=kind, action="drop") for kind in kinds]
    order = Cleaning(actions=actions, held_out=HeldOut(share=0.2), columns=named)
    for columns, line in ((None, 7), (named, 9)):
        with workshop.session() as session:
            file = session.get_one(File, source)
            report = file_reports.request(session, file, base=workshop.base_id, columns=columns)
            found = [Finding("implausible_output", [line], 1.0, "Is odd.", "Read it.")]
            workshop.storage.put(f"{report.prefix}/report.json", Report(15, found).as_json().encode())
            file_reports.finish(session, report, summary={})
        if columns is None:
            with pytest.raises(InvalidValue, match="the same 'columns'"):
                _ask(workshop, source, order, test, workshop.base_id)

    made = _ask(workshop, source, order, test, workshop.base_id)
    assert _work(workshop)

    lineage = _row(workshop, FileCleaning, made)
    assert _dropped(workshop, made) == {
        6: "test_leak",
        9: "implausible_output",
        16: "answer_cut",
    }
    parts = [_content(workshop, id) for id in (made, lineage.held_out_id)]
    kept = [json.loads(line) for part in parts for line in part.splitlines()]
    wanted = [line.split(",") for number, line in enumerate(lines, 2) if number not in (6, 9)]
    assert sorted(kept, key=lambda row: int(row["Nr"])) == [
        dict(zip(names.split(","), row, strict=True)) for row in wanted
    ]
    encoder = find_encoder(Supervised(), "training", named)
    assert sum(check_examples([part], encoder=encoder, least=1).examples for part in parts) == 12


def test_a_chosen_line_of_a_table_drops_the_row_that_begins_there(workshop: Workshop) -> None:
    source = workshop.file(table("\r\n"), checked=False)
    made = _ask(workshop, source, Cleaning(rows=RowChoice(drop=[MAIL])))
    assert _work(workshop)
    assert _dropped(workshop, made) == {INVALID: "invalid_row", MAIL: "rows.drop"}
    assert len(_content(workshop, made).splitlines()) == 4
    assert b"eve@" not in _content(workshop, made)
    inside = _ask(workshop, source, Cleaning(rows=RowChoice(drop=[NEXT_LINE])))
    assert _work(workshop)
    assert f"one does on line {WITH_BREAKS}." in _row(workshop, File, inside).status_details


@pytest.mark.parametrize(
    ("content", "version", "line"),
    [(b"prompt,completion\n" + b"Who?,Ada.\n" * 9, 7, None), (b"prompt,completion\n" + b"Who?,Ada.\n" * 9, 8, 4),
     (training_rows(9), 7, 4)],
    ids=["table before", "table", "JSON Lines before"],
)  # fmt: skip
def test_a_base_s_report_that_counts_a_table_by_rows_drops_none(
    workshop: Workshop, content: bytes, version: int, line: int | None
) -> None:
    source = workshop.file(content)
    found = [Finding("implausible_output", [4], 1.0, "Is odd.", "Read it.")]
    with workshop.session() as session:
        report = file_reports.request(session, session.get_one(File, source), base=workshop.base_id)
        workshop.storage.put(f"{report.prefix}/report.json", Report(9, found).as_json().encode())
        kind = "JSONL" if line and version == 7 else "CSV"
        file_reports.finish(session, report, summary={"format": kind})
        report.version = version
    order = Cleaning(actions=[Action(kind="implausible_output", action="drop")])
    if line is None:
        with pytest.raises(InvalidValue, match="Request the file's report with this 'base'"):
            _ask(workshop, source, order, base=workshop.base_id)
        order = Cleaning(actions=[Action(kind="truncated_output", action="drop")])
    made = _ask(workshop, source, order, base=workshop.base_id)
    assert _work(workshop)
    assert [*_dropped(workshop, made)] == ([] if line is None else [line])


def test_what_a_file_was_cleaned_into_repeats_nothing(workshop: Workshop) -> None:
    source, other = workshop.file(training_rows(12)), workshop.file(training_rows(13))
    made = _ask(workshop, source, Cleaning(recommended=True, held_out=HeldOut(share=0.2)))
    with workshop.session() as session:
        lineage = session.get_one(FileCleaning, made)
        parts = {made: training_rows(10), lineage.held_out_id: training_rows(2, first=10)}
        stored = {id: workshop.storage.put(f"files/{id}", content) for id, content in parts.items()}
        assert cleanings.finish(session, lineage, {}, stored) == []
        for report in session.scalars(select(FileReport)):
            file_reports.finish(session, report, summary={"trainable": True, "reason": None})

    def named(id: str) -> set[str]:
        with workshop.session() as session:
            file = session.get_one(File, id)
            return {one.id for one, _ in file_reports.others(session, file.project_id, file.sha256)}

    held = lineage.held_out_id
    assert named(source) == {other}
    assert (named(made), named(held)) == ({other, held}, {other, made})
    assert named(other) == {source, made, held}


def test_a_worker_that_stops_gives_its_try_back(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _ask(workshop, workshop.file(training_rows(12)), Cleaning(recommended=True))
    drain = Drain()
    drain.begin()
    assert cleaning.clean_next(workshop.settings, workshop.storage, drain)
    assert (_row(workshop, File, made).status, _row(workshop, FileCleaning, made).tries) == ("uploaded", 0)

    def fail(*_: Any) -> None:
        raise StorageFailed(action="read", key="files/x", reason="away")

    with monkeypatch.context() as patch:
        patch.setattr(cleaning, "_lay_out", fail)
        with pytest.raises(StorageFailed):
            _work(workshop)
    assert _row(workshop, FileCleaning, made).tries == 0


def test_a_cleaning_shows_its_progress_and_has_a_limit(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _ask(workshop, workshop.file(training_rows(12)), Cleaning(recommended=True))
    cleaning._show_progress(made, tmp_path)
    progress.write(tmp_path, 0.25)
    cleaning._show_progress(made, tmp_path)
    assert _row(workshop, FileCleaning, made).progress == 0.25
    monkeypatch.setattr(cleaning, "SECONDS", 0)
    assert _work(workshop)
    assert "took more than 0 minutes. Split the file." in _row(workshop, File, made).status_details


def test_a_new_file_that_is_deleted_meanwhile_leaves_no_bytes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _ask(workshop, workshop.file(training_rows(12)), Cleaning(recommended=True))
    lay_out = cleaning._lay_out

    def lay_out_and_delete(*arguments: Any) -> None:
        lay_out(*arguments)
        with workshop.session() as session:
            files.delete(session, session.get_one(File, made), in_use_by=None)
            assert files.purge(session, workshop.storage, lambda *_: None) == 1

    monkeypatch.setattr(cleaning, "_lay_out", lay_out_and_delete)
    assert _work(workshop)
    assert f"files/{made}" not in set(workshop.storage.list("files/"))
