"""Examples of a large file are stored on disk, train like those in memory, and need little memory."""

import json
import random
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import chat, lay_out, plan, steps_of

from tunery.failures import DiskFull
from tunery.rows import bulk, preparers
from tunery.rows.template import ChatTemplate
from tunery.spec import Dpo
from worker.trainer import data
from worker.trainer.blocks import Block
from worker.trainer.data import IGNORED, Example, Row, Rows
from worker.trainer.replay import mixing
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal
from worker.trainer.stored_rows import StoredExamples, keep


def made(count: int, seed: int = 0) -> Iterator[Block]:
    """Yields random blocks as a file's lines give them: none to two examples, each of one or two rows."""
    dice = random.Random(seed)

    def row() -> Row:
        ids = [dice.randrange(300_000) for _ in range(dice.randint(2, 9))]
        return Row(ids, [id if dice.random() < 0.5 else IGNORED for id in ids])

    for _ in range(count):
        yield block_of([[row() for _ in range(dice.randint(1, 2))] for _ in range(dice.randint(0, 2))])


def block_of(examples: list[list[Row]]) -> Block:
    block = Block()
    for example in examples:
        block.add(example)
    return block


def as_lists(examples: Any) -> list[list[tuple[list[int], list[int]]]]:
    return [[(row.input_ids, row.labels) for row in example.rows] for example in examples]


def both(tmp_path: Path, count: int = 40) -> tuple[Rows, Rows]:
    held, stored = keep(made(count), tmp_path, 10**6), keep(made(count), tmp_path, 20)
    assert isinstance(held, list)
    assert isinstance(stored, StoredExamples)
    return Rows(held), Rows(stored)


def test_stored_examples_are_those_in_memory(tmp_path: Path) -> None:
    held, stored = both(tmp_path)
    assert as_lists(stored.examples) == as_lists(held.examples)
    assert as_lists(stored.examples[3:11]) == as_lists(held.examples[3:11])
    assert as_lists([stored.examples[-1]]) == as_lists([held.examples[-1]])
    assert list(stored.lengths) == list(held.lengths)
    assert (stored.tokens, stored.count) == (held.tokens, held.count)
    assert [row.labelled for row in stored.rows] == [row.labelled for row in held.rows]
    assert [each.labelled for each in stored.examples] == [each.labelled for each in held.examples]
    assert [each.shape for each in stored.examples] == [each.shape for each in held.examples]
    assert [row.input_ids for row in stored.rows[2:7]] == [row.input_ids for row in held.rows[2:7]]
    assert stored.sha256 == held.sha256
    with pytest.raises(IndexError):
        stored.examples[len(held.examples)]


def test_replay_stands_behind_stored_examples(tmp_path: Path) -> None:
    held, stored = both(tmp_path)
    general = [Example((Row([1, 2, 3 + number], [IGNORED, 2, 3 + number]),)) for number in range(9)]
    one, other = mixing.mix(held, general, 0.2), mixing.mix(stored, general, 0.2)
    assert as_lists(other.examples) == as_lists(one.examples)
    assert (other.tokens, other.count, other.sha256) == (one.tokens, one.count, one.sha256)
    assert other.rows[-1].input_ids == general[-1].rows[0].input_ids


def test_references_are_attached_to_stored_examples(tmp_path: Path) -> None:
    held, stored = both(tmp_path)
    numbers = [[-float(at + 1) for at, _ in enumerate(example.rows)] for example in held.examples]
    held.attach(numbers)
    stored.attach(numbers)
    assert [each.reference for each in stored.examples] == [each.reference for each in held.examples]


def test_memory_grows_by_a_few_numbers_a_row(tmp_path: Path) -> None:
    def rows(count: int) -> Iterator[Block]:
        ids = list(range(1000, 1200))
        for _ in range(count):
            yield block_of([[Row(list(ids), list(ids))]])

    tracemalloc.start()
    try:
        stored = keep(rows(5000), tmp_path, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(stored) == 5000
    assert peak < 5000 * 3200 / 10, "as lists they take 3,200 bytes a row and more"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DiskFull, match="a file's tokens could not be written"):
            keep(made(1000), tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_by_several_processes_are_alike(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = tmp_path / "train.jsonl", [chat(seed) for seed in range(60)]
    rows[20]["messages"][0]["content"] = rows[50]["messages"][-1]["content"] = "far " * 90
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template, found = ChatTemplate.load(tiny), []
    monkeypatch.setattr(preparers, "COUNT", 2)
    monkeypatch.setattr(preparers, "ROWS", 7)
    for first, most in ((1000, 10**6), (10, 10**6), (10, 50)):
        monkeypatch.setattr(bulk, "PROCESSES_FROM", first)
        monkeypatch.setattr(data, "MOST_IN_MEMORY", most)
        found.append(data.read_rows(path, template, 80))
    one, *others = found
    assert (one.unlearnable, one.truncated) == ((21,), (51,))
    assert [(rows.sha256, rows.unlearnable, rows.truncated) for rows in others] == [
        (one.sha256, one.unlearnable, one.truncated)
    ] * 2


PAIRS = [{"prompt": f"What comes after {n}?", "chosen": f"{n + 1}", "rejected": "no"} for n in range(12)]


@pytest.mark.parametrize(
    ("rows", "changes"),
    [([chat(seed) for seed in range(12)], {"packing": True}), (PAIRS, {"method": Dpo()})],
    ids=["chats", "pairs"],
)
def test_a_run_from_the_file_is_the_run_from_memory(
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for name, most in (("held", 10**6), ("stored", 0)):
        monkeypatch.setattr(data, "MOST_IN_MEMORY", most)
        folder = lay_out(tmp_path / name, tiny, plan(**changes), rows, rows[:4])
        carry_out(folder, MessageWriter(None), StopSignal())
        found.append(steps_of(folder))
    assert len(found[0]) >= 3
    assert found[0] == found[1]
