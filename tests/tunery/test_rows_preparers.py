"""Several processes prepare the rows of a large file as one process would, in the file's order."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psutil
import pytest
from digests import dying, everything, failing, pids
from templates import CHATML, SPECIAL, tokenizer

from tunery.datasets.rules import Overlap, check_examples
from tunery.failures import InvalidTrainingFile
from tunery.rows import bulk, preparers
from tunery.rows.bulk import Judged, Reading
from tunery.rows.encoding import CHATS, PAIRS, RowEncoder
from tunery.rows.messages import parse_row
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate

REFUSING = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('never') }}{% endif %}{% endfor %}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"


def chat(asked: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": asked[::-1]}]
    return {"messages": turns * (1 + len(asked) % 3), **more}


def spelled(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FUNCTION = {"type": "function", "function": {"name": "trains"}}
ASKED = [f"{word} {number}?" for number in range(20) for word in ("to Brugg", "why", "how far", "")]
CHAT_ROWS = [chat(asked, **({"tools": [FUNCTION]} if len(asked) % 2 else {})) for asked in ASKED]
PAIR_ROWS = [{"prompt": asked, "chosen": "yes", "rejected": "never" if "why" in asked else "nay"} for asked in ASKED]
ROWS = [chat(f"how far is it to Brugg, {number}?") for number in range(60)]


def template(source: str = CHATML) -> ChatTemplate:
    made = tokenizer()
    return ChatTemplate(
        made, {"default": source}, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]}, [made.token_to_id(SPECIAL[2])]
    )


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses two processes from the sixth row on, four rows at a time."""
    monkeypatch.setattr(bulk, "PROCESSES_FROM", 5)
    monkeypatch.setattr(preparers, "COUNT", 2)
    monkeypatch.setattr(preparers, "ROWS", 4)


def digested(data: bytes, digest: Callable[[Iterator[Judged]], Any], encoder: RowEncoder = CHATS, **more: Any) -> Any:
    reading = Reading("training", encoder, more.pop("template", None) or template(), 90)
    return [item for part in bulk.digest_rows([data], reading, digest, **more) for item in part]


@pytest.mark.parametrize(
    ("encoder", "rows", "source"), [(CHATS, CHAT_ROWS, TOOLS + REFUSING + CHATML), (PAIRS, PAIR_ROWS, CHATML)]
)
@pytest.mark.usefixtures("several")
def test_rows_of_several_processes_equal_those_of_one(
    encoder: RowEncoder, rows: list[dict[str, Any]], source: str
) -> None:
    data = spelled([*rows[:9], {"messages": []}, chat("no 1?"), *rows])
    alone = everything(bulk.encode_rows([data], "training", encoder, made := template(source), max_length=90))
    assert digested(data, everything, encoder, template=made) == alone


@pytest.mark.usefixtures("several")
def test_several_processes_are_at_work() -> None:
    found = digested(spelled(ROWS), pids)
    assert [number for number, _ in found] == list(range(1, 61))
    assert [pid == os.getpid() for _, pid in found] == [True] * 5 + [False] * 55
    assert len({pid for _, pid in found}) == 3
    assert not psutil.pid_exists(found[-1][1])


@pytest.mark.parametrize("broken", [b"\xff\n", b"\n\n{}\n"])
@pytest.mark.usefixtures("several")
def test_rows_above_what_cannot_be_read_are_given(broken: bytes) -> None:
    numbers = []
    with pytest.raises(InvalidTrainingFile, match="Line 61"):  # noqa: PT012
        for part in bulk.digest_rows([spelled(ROWS), broken], Reading("training", CHATS, template(), 90), pids):
            numbers += [number for number, _ in part]
    assert numbers == list(range(1, 61))


@pytest.mark.usefixtures("several")
def test_what_a_process_cannot_do_is_done_here() -> None:
    data, here = spelled(ROWS), os.getpid()
    assert digested(data, dying) == digested(data, everything)
    with pytest.raises(ValueError, match="row 33 is not liked"):
        digested(data, failing)
    assert {pid for _, pid in digested(data, lambda rows: pids(rows))} == {here}, "it cannot be pickled"
    local = RowEncoder(lambda row, role: parse_row(row, role), CHATS.encode)
    assert {pid for _, pid in digested(data, pids, local)} == {here}


@pytest.mark.usefixtures("several")
def test_processes_that_cannot_start_are_tried_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    usual = preparers.subprocess.Popen

    def counted(command: list[str], **options: Any) -> Any:
        started.append(command[4])
        return usual(command, **options)

    monkeypatch.setattr(preparers, "_START", broken := "import sys; sys.exit(3)")
    monkeypatch.setattr(preparers.subprocess, "Popen", counted)
    assert {pid for _, pid in digested(spelled(ROWS), pids)} == {os.getpid()}
    assert started.count(broken) == 2


@pytest.mark.usefixtures("several")
def test_processes_end_with_their_reader_and_read_little_ahead() -> None:
    given = []

    def chunks() -> Iterator[bytes]:
        for number, row in enumerate(ROWS * 5):
            given.append(number)
            yield spelled([{**row, "id": "7" * 5000}])  # the format is found from the first 64 KiB

    before = {child.pid for child in psutil.Process().children()}
    with closing(bulk.digest_rows(chunks(), Reading("training", CHATS, template(), 90), pids)) as parts:
        first = [next(parts) for _ in range(4)]
        started = {child.pid for child in psutil.Process().children() if child.pid not in before}
        assert first[-1][-1][0] <= len(given) < 100
        assert first[-1][0][1] in started
    assert not any(map(psutil.pid_exists, {first[-1][0][1]}))


@pytest.mark.usefixtures("several")
def test_columns_that_only_later_rows_have_are_described() -> None:
    rows: list[dict[str, Any]] = [{"question": f"{number}?", "answer": "yes"} for number in range(50)]
    rows[40]["system"] = "Be brief."
    shape = FileShape()
    digested(spelled(rows), pids, shape=shape)
    assert shape.used == {"user": "question", "assistant": "answer", "system": "system"}


def summaries(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """The summaries of one process and of two, with the reasons of shared rows; or the messages of the refusals."""
    found = []
    for count in (1, 2):
        monkeypatch.setattr(preparers, "COUNT", count)
        overlap = Overlap()
        try:
            check_examples([spelled(rows[:30])], template=template(), max_length=90, overlap=overlap)
            summary = check_examples(
                [spelled(rows)], role="test", template=template(), max_length=90, overlap=overlap, **options
            )
            found.append((summary, summary.shape.used, overlap.reason("test")))
        except InvalidTrainingFile as fault:
            found.append(fault.message)
    return found


@pytest.mark.usefixtures("several")
def test_a_files_summary_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        *map(chat, ASKED),
        chat("far " * 40),
        chat("", id=7),
        chat(f"a {SPECIAL[2]} b", seen="twice"),
        *ROWS[:9],
    ]
    one, several = summaries(rows, monkeypatch, answered=70)
    assert one == several
    assert not isinstance(one, str), one
    summary = one[0]
    assert (len(summary.answer_tokens), len(summary.spelled), summary.silent) == (70, 1, [82])
    assert {1, 92} < set(summary.truncated)
    assert summary.unknown_keys == {"seen": None}
    assert "It shares" in one[2]


@pytest.mark.usefixtures("several")
def test_the_faults_of_a_file_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one, several = summaries([*ROWS, *[{"messages": []}] * 130], monkeypatch)
    assert one == several
    assert "Example 61 " in one
    assert "and 94 more; later rows were not read" in one


def test_a_pickled_error_says_the_same() -> None:
    fault = InvalidTrainingFile(param="test_file", role="test", reason="Line 3: {no} braces are filled.")
    again = pickle.loads(pickle.dumps(fault))
    assert (type(again), again.message, again.param, again.fields) == (
        InvalidTrainingFile,
        fault.message,
        "test_file",
        fault.fields,
    )
