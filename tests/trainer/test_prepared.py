"""Runs read the rows that an earlier run has prepared, and prepare them again only if the tokens would differ."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from run_folders import Ear, chat, lay_out, plan, said, steps_of

from tunery.rows import bulk, encoding, fingerprint, template_files
from tunery.rows.template import ChatTemplate
from tunery.spec import Columns, Dpo, Supervised
from worker.trainer import data, prepared
from worker.trainer.data import Rows
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(seed) for seed in range(40)]
DATED = "{{ strftime_now('%d %b %Y') }}"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / prepared.NAME
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list of the roles of the files whose rows are prepared, in order."""
    found: list[str] = []
    usual = bulk.digest_rows

    def counted(chunks: Any, reading: bulk.Reading, *others: Any) -> Any:
        found.append(reading.role)
        return usual(chunks, reading, *others)

    monkeypatch.setattr(bulk, "digest_rows", counted)
    return found


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_lists(rows: Rows) -> list[list[tuple[list[int], list[int]]]]:
    return [[(row.input_ids, row.labels) for row in example.rows] for example in rows.examples]


@pytest.mark.parametrize("most", [10**6, 10], ids=["in memory", "in a file"])
def test_a_second_reading_prepares_nothing(
    most: int, kept: Path, tiny: Path, tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MOST_IN_MEMORY", most)
    ROWS[20]["messages"][0]["content"] = "far " * 90
    first, second = (written(tmp_path / name / "train.jsonl", ROWS) for name in ("first", "second"))
    alone = data.read_rows(first, ChatTemplate.load(tiny), 80)
    found = [data.read_rows(path, ChatTemplate.load(tiny), 80, kept=kept) for path in (first, second)]
    assert readings == ["training"] * 2, "alone, and once for both"
    for rows in found:
        assert as_lists(rows) == as_lists(alone)
        assert (rows.sha256, rows.truncated, rows.unlearnable) == (alone.sha256, alone.truncated, alone.unlearnable)
        assert (list(rows.lengths), rows.tokens) == (list(alone.lengths), alone.tokens)
        assert [row.labelled for row in rows.rows] == [row.labelled for row in alone.rows]
    assert alone.unlearnable


def test_a_second_job_trains_alike_and_prepares_nothing(
    kept: Path, tiny: Path, tmp_path: Path, ear: Ear, readings: list[str]
) -> None:
    found, read = [], []
    for name in ("first", "second"):
        folder = lay_out(tmp_path / name, tiny, plan(), ROWS, ROWS[:4])
        (folder / prepared.NAME).symlink_to(kept)
        carry_out(folder, MessageWriter(ear.descriptor), StopSignal())
        found.append(steps_of(folder))
        *_, finished = said(ear, "finished")
        read.append(finished.spent["rows"])
    assert readings == ["training", "validation"]
    assert found[0] == found[1]
    assert (read[0].units > 0, read[0].seconds > 0, read[1].units) == (True, True, 0)  # for the quotes of later runs


def key(path: Path, template: ChatTemplate, encoder: encoding.RowEncoder = encoding.CHATS, **changes: Any) -> Any:
    return prepared.key(path, template, encoder, changes.get("role", "training"), changes.get("max_length", 80))


def made_of(template: ChatTemplate, **changes: Any) -> ChatTemplate:
    names = ("tokenizer", "templates", "special_tokens", "eos_ids", "now")
    return ChatTemplate(**dict(zip(names, template._made_of, strict=True)) | changes)


def test_all_that_decides_about_tokens_is_in_the_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, template = written(tmp_path / "a" / "train.jsonl", ROWS), ChatTemplate.load(tiny)
    tokenizer, source = template._made_of[0], template._made_of[1]["default"]
    other = type(tokenizer).from_str(tokenizer.to_str())
    other.add_special_tokens(["<|more|>"])
    dated = {"default": source + DATED}
    days = [datetime(2026, 3, day, hour, tzinfo=UTC) for day in (1, 2) for hour in (1, 2)]
    find = encoding.find_encoder
    names = [
        key(path, template),
        key(written(tmp_path / "b" / "train.jsonl", ROWS[:-1]), template),
        key(path, made_of(template, tokenizer=other)),
        key(path, made_of(template, templates={"default": source + " "})),
        key(path, made_of(template, templates=dated, now=days[0])),
        key(path, made_of(template, templates=dated, now=days[2])),
        key(path, made_of(template, special_tokens={})),
        key(path, made_of(template, eos_ids=[])),
        key(path, template, role="validation"),
        key(path, template, max_length=81),
        key(path, template, find(Dpo(), "training")),
        key(path, template, find(Supervised(), "training", Columns(messages="chat"))),
        key(path, template, find(Supervised(loss_on="all"), "training")),
        key(path, template, find(Supervised(loss_on="last_assistant"), "training")),
        key(path, template, find(Supervised(), "training", None, "drop")),
        key(path, template, find(Supervised(loss_on="all"), "training", None, "drop")),
    ]
    monkeypatch.setattr(fingerprint, "_code", lambda module: "another release")
    names.append(key(path, template))
    assert None not in names
    assert len(set(names)) == len(names)


def test_what_decides_about_no_token_is_not_in_the_name(tiny: Path, tmp_path: Path) -> None:
    path, template = written(tmp_path / "train.jsonl", ROWS), ChatTemplate.load(tiny)
    dated = {"default": template._made_of[1]["default"] + DATED}
    noon, night = (datetime(2026, 3, 1, hour, tzinfo=UTC) for hour in (12, 23))
    assert key(path, template) == key(path, ChatTemplate.load(tiny, now=noon))
    assert key(path, made_of(template, templates=dated, now=noon)) == key(
        path, made_of(template, templates=dated, now=night)
    )
    assert key(path, made_of(template, templates=dated)) is None, "the clock's today may be another's tomorrow"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ messages }}", []),
        ("{{ strftime_now('%Y') }}{{ strftime_now( \"%d\" ) }}{{ strftime_now('%Y') }}", ["2026", "01"]),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}", ["2026"]),
        ("{% set now = strftime_now %}{{ now('%H') }}", ["2026-03-01T12:00:00+00:00"]),
        ("{{ strftime_now('%Y') }}{{ strftime_now(form) }}", ["2026-03-01T12:00:00+00:00"]),
    ],
)
def test_dates_that_a_template_writes(source: str, wanted: list[str]) -> None:
    assert template_files.dates({"default": source}, datetime(2026, 3, 1, 12, tzinfo=UTC)) == wanted


def test_code_of_others_may_change_so_its_rows_are_not_kept(tiny: Path, tmp_path: Path) -> None:
    path, template = written(tmp_path / "train.jsonl", ROWS), ChatTemplate.load(tiny)
    parse = lambda row, role: encoding.CHATS.parse(row, role)  # noqa: E731
    assert key(path, template, replace(encoding.CHATS, parse=parse)) is None
    foreign = partial(encoding.encode_whole, lambda *given, **named: encoding.encode_example(*given, **named))
    assert key(path, template, replace(encoding.CHATS, encode=foreign)) is None


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda entry: b"",
    lambda entry: entry[:-1],
    lambda entry: entry[:50],
    lambda entry: entry + b"\0",
    lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
    lambda entry: entry[:-60] + bytes([entry[-60] ^ 1]) + entry[-59:],
    lambda entry: b"\0" * len(entry),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_prepared_again(
    damage: Callable[[bytes], bytes], kept: Path, tiny: Path, tmp_path: Path, readings: list[str]
) -> None:
    path, template = written(tmp_path / "train.jsonl", ROWS), ChatTemplate.load(tiny)
    first = data.read_rows(path, template, 80, kept=kept)
    [entry] = kept.glob("[!.]*")
    entry.write_bytes(damage(entry.read_bytes()))
    for _ in range(2):
        assert as_lists(data.read_rows(path, template, 80, kept=kept)) == as_lists(first)
    assert len(readings) == 2, "once, and once more for the damage"


def test_two_at_once_prepare_once(kept: Path, tiny: Path, tmp_path: Path, readings: list[str]) -> None:
    path = written(tmp_path / "train.jsonl", ROWS)
    found: list[Any] = []
    read = partial(data.read_rows, path, max_length=80, kept=kept)
    threads = [
        threading.Thread(target=lambda: found.append(as_lists(read(template=ChatTemplate.load(tiny)))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert len(readings) == 1


def test_old_entries_go_and_then_those_used_longest_ago(
    kept: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    ages = {"old": 8, ".partial-left": 8, "long ago": 5, "lately": 3, ".partial-new": 0}
    for name, days in ages.items():
        (kept / name).write_bytes(b"x" * 5000)
        os.utime(kept / name, (now - days * 86400,) * 2)
    template, path = ChatTemplate.load(tiny), written(tmp_path / "train.jsonl", ROWS[:12])
    rows = data.read_rows(path, template, 80)
    monkeypatch.setattr(prepared, "_most", lambda folder: 11_000 + 8 * rows.tokens)
    data.read_rows(path, template, 80, kept=kept)
    assert {"lately", ".partial-new"} < {entry.name for entry in kept.iterdir()}
    assert not {"old", ".partial-left", "long ago"} & {entry.name for entry in kept.iterdir()}
    monkeypatch.setattr(prepared, "_most", lambda folder: 100)
    data.read_rows(path, template, 79, kept=kept)
    assert not list(kept.glob("[!.]*")), "it alone is too large, and nothing else fits"


def test_an_entry_that_is_too_large_with_all_that_is_written_is_not_written(
    kept: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, path = ChatTemplate.load(tiny), written(tmp_path / "train.jsonl", ROWS[:12])
    tokens = data.read_rows(path, template, 80, kept=kept).tokens
    (entry,) = kept.glob("[!.]*")
    size, sizes = entry.stat().st_size, list[int]()
    write = prepared._write

    def noted(file: IO[bytes], *others: Any) -> None:
        write(file, *others)
        sizes.append(file.tell())

    monkeypatch.setattr(prepared, "_write", noted)
    for most in (size, size - 1):
        entry.unlink()
        monkeypatch.setattr(prepared, "_most", lambda folder, most=most: most)
        data.read_rows(path, template, 80, kept=kept)
    assert sizes == [size]
    assert size > 8 * tokens


@pytest.mark.parametrize(("setting", "is_kept"), [("0", False), ("", True), ("0.5", True)])
def test_the_setting_says_how_much_is_kept(
    setting: str, is_kept: bool, kept: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(prepared.SETTING, setting)

    data.read_rows(written(tmp_path / "train.jsonl", ROWS[:12]), ChatTemplate.load(tiny), 80, kept=kept)

    assert bool(list(kept.glob("[!.]*"))) is is_kept
    fraction = float(setting or prepared.FRACTION)
    assert prepared._most(kept) == int(shutil.disk_usage(kept).total * fraction)


def test_a_full_disk_keeps_nothing_and_trains(
    kept: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "_write", full)
    rows = data.read_rows(written(tmp_path / "train.jsonl", ROWS), ChatTemplate.load(tiny), 80, kept=kept)
    assert len(rows.examples) > 30
    assert not list(kept.glob("[!.]*"))
    assert not list(kept.glob(".partial-*"))
