"""Uploaded files that are cleaned: new files beside them, with their lineage."""

import json
from typing import Any

from workshop import Workshop, training_rows

from tunery.datasets import cleanings, shelf
from tunery.datasets.cleaning.order import Cleaning, HeldOut
from tunery.datasets.model import File, FileCleaning
from worker.io import cleaning
from worker.supervisor.drain import Drain


def _content(workshop: Workshop, file_id: str) -> bytes:
    return b"".join(workshop.storage.read(f"files/{file_id}"))


def _row(workshop: Workshop, kind: type[Any], id: str) -> Any:
    with workshop.session() as session:
        return session.get_one(kind, id)


def _ask(workshop: Workshop, source: str, order: Cleaning, against: str | None = None) -> str:
    with workshop.session() as session:
        other = session.get_one(File, against) if against else None
        return cleanings.request(session, session.get_one(File, source), order, against=other).id


def _work(workshop: Workshop) -> bool:
    return cleaning.clean_next(workshop.settings, workshop.storage, Drain())


def test_a_new_file_has_its_lineage_and_the_source_stays(workshop: Workshop) -> None:
    rows = training_rows(40) + training_rows(1) + b'{"messages": [{"role": "user", "content": "x"}]}\n'
    source, test = workshop.file(rows), workshop.file(training_rows(3, first=10))
    made = _ask(workshop, source, Cleaning(recommended=True, held_out=HeldOut(share=0.2)), test)
    with workshop.session() as session:
        assert shelf.next_unprocessed(session) is None
    assert _row(workshop, File, made).status == "uploaded"

    assert _work(workshop)
    assert not _work(workshop)

    assert _content(workshop, source) == rows
    row, lineage = _row(workshop, File, made), _row(workshop, FileCleaning, made)
    held = _row(workshop, File, lineage.held_out_id)
    assert (row.status, held.status) == ("processed", "processed")
    assert (row.filename, held.filename) == ("rows-clean.jsonl", "rows-held-out.jsonl")
    assert lineage.outcome["source_sha256"] == _row(workshop, File, source).sha256
    kinds = {one["line"]: one["kind"] for one in lineage.outcome["dropped"]}
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
        shelf.delete(session, session.get_one(File, made), in_use_by=None)
        assert shelf.purge(session, workshop.storage, lambda *_: None) == 1
    assert _row(workshop, FileCleaning, made).outcome["dropped"] == []


def test_a_cleaning_that_leaves_nothing_says_so(workshop: Workshop) -> None:
    bad = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    made = _ask(workshop, workshop.file(bad), Cleaning(recommended=True))
    assert _work(workshop)
    row = _row(workshop, File, made)
    assert (row.status, row.bytes) == ("error", 0)
    assert "No row is left" in row.status_details


def test_a_cleaning_over_which_workers_end_fails(workshop: Workshop) -> None:
    made = _ask(workshop, workshop.file(training_rows(12)), Cleaning(recommended=True))
    for _ in range(cleanings.MAX_TRIES):
        with workshop.session() as session:
            assert cleanings.begin(session, made) is not None
    assert _work(workshop)
    assert "ended 3 times" in _row(workshop, File, made).status_details
    assert not _work(workshop)
