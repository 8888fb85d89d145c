"""A format is an entry of the registry: upload, validation and trainer read its files with the same function."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models

from tunery.datasets.rules import check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows import readers
from tunery.rows.errors import InvalidRows
from tunery.rows.formats import Format, SourceRow
from tunery.rows.jsonl import JSONL
from tunery.rows.template import ChatTemplate
from worker.trainer.data import read_rows


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Format:
    """Adds a format to the registry for one test."""
    monkeypatch.setattr(readers, "FORMATS", dict(readers.FORMATS))
    from toy_format import CARDS

    readers.FORMATS[CARDS.name] = CARDS
    return CARDS


def write(count: int, wrong: int | None = None) -> bytes:
    """A file of `count` cards; the one numbered `wrong` has no answer."""
    lines = (f"Q: What comes after {n}?\n{'B' if n == wrong else 'A'}: {n + 1}\n" for n in range(1, count + 1))
    return "".join(lines).encode()


def as_jsonl(count: int) -> bytes:
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"What comes after {n}?"},
                {"role": "assistant", "content": f"{n + 1}"},
            ]
        }
        for n in range(1, count + 1)
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("size", [1, 7, 2**20])
def test_rows_of_another_format_are_the_same_rows(cards: Format, size: int) -> None:
    data = write(12)
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(readers.read(chunks)) == list(readers.read([as_jsonl(12)]))


@pytest.mark.parametrize("size", [readers.HEAD_BYTES - 1, readers.HEAD_BYTES, readers.HEAD_BYTES + 1])
def test_format_sees_the_same_head_however_chunks_end(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    class Nothing:
        def feed(self, chunk: bytes) -> Iterator[SourceRow]:
            yield from ()

        close = feed  # type: ignore[assignment]

    spy = Format("spy", lambda head: bool(seen.append(head)), Nothing)  # type: ignore[func-returns-value]
    monkeypatch.setattr(readers, "FORMATS", {"spy": spy})
    data = b"x" * 3 * readers.HEAD_BYTES
    with pytest.raises(InvalidRows, match="begin with a JSON object"):
        list(readers.read([data[:size], data[size:]]))
    assert seen == [data[: readers.HEAD_BYTES]]


def test_upload_names_the_format_and_the_row(cards: Format) -> None:
    checker = readers.Checker()
    checker.feed(write(12, wrong=7))
    with pytest.raises(InvalidRows) as caught:
        checker.close()
    assert caught.value.message == "Expected file to have cards format. Row 7: has no line 'A: '."
    assert caught.value.code == "invalid_rows"


def test_validation_and_trainer_read_it_alike(cards: Format, tmp_path: Path) -> None:
    tiny_models.tokenizer(tmp_path, tiny_models.CHATML)
    template, path = ChatTemplate.load(tmp_path), tmp_path / "train.jsonl"
    path.write_bytes(write(12))
    assert check_examples([write(12)], template=template).tokens == read_rows(path, template, 2048).tokens
    path.write_bytes(write(12, wrong=7))
    with pytest.raises(InvalidTrainingFile, match="Example 7: has no line") as validated:
        check_examples([write(12, wrong=7)], template=template)
    with pytest.raises(InvalidTrainingFile) as trained:
        read_rows(path, template, 2048)
    assert trained.value.message == validated.value.message


@pytest.mark.parametrize("head", [b'{"a"', b' \r\n {"a"', b"\xef\xbb\xbf{", b"", b"words\n", b"\x00", b'"a,b"'])
def test_what_no_other_format_recognises_is_json_lines(head: bytes) -> None:
    assert readers.recognise(head) is JSONL
