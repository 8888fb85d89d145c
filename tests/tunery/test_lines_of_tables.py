"""Rows of a table are named by the lines on which they begin, wherever a user reads or gives a number."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from lined_table import DUPLICATES, EMPTY, ENDS, INVALID, MAIL, NEXT_LINE, WITH_BREAKS, table
from templates import CHATML, tokenizer

from tunery.datasets.cleaning import cleaner
from tunery.datasets.cleaning.order import Cleaning, RowChoice
from tunery.datasets.errors import NothingToCompare
from tunery.datasets.report import maker
from tunery.datasets.rules import Overlap, check_examples
from tunery.errors import InvalidValue
from tunery.failures import InvalidTrainingFile
from tunery.rows import preview, preview_page, readers
from tunery.rows.encoding import encoder_of_any
from tunery.rows.errors import InvalidRows
from tunery.rows.template import ChatTemplate

PROMPTS = {
    2: "How do I pay?",
    WITH_BREAKS: "Where am I?\nI see a gate.\nAnd a tower.",
    7: "how do I  pay?",
    MAIL: "Mail me at\neve@example.org.",
    EMPTY: "What is new?",
}


@pytest.fixture(params=ENDS, ids=["LF", "CRLF"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_bytes(table(request.param))
    return path


def valid(path: Path) -> bytes:
    """The table with a space for the third value of the line that has one."""
    return path.read_bytes().replace(b"Ada,too", b"Ada too")


def test_an_editor_shows_these_lines() -> None:
    lines = table().decode().splitlines()
    assert {at: lines[at - 1].strip('"').split(",")[0] for at in PROMPTS} == {
        at: prompt.partition("\n")[0] for at, prompt in PROMPTS.items()
    }


def test_errors_and_warnings(path: Path) -> None:
    with pytest.raises(InvalidRows, match=rf"Line {INVALID}: has 3 values"):
        readers.Checker().feed(path.read_bytes().ljust(readers.HEAD_BYTES, b"\n"))
    with pytest.raises(InvalidTrainingFile, match=rf"Line {INVALID}: has 3 values"):
        check_examples([path.read_bytes()], least=1)
    overlap = Overlap()
    summary = check_examples([valid(path)], least=1, overlap=overlap)
    assert (summary.examples, summary.silent) == (6, [EMPTY])
    check_examples([b"prompt,completion\n\nx,y\n" + valid(path)], role="validation", overlap=overlap)
    shared = "line 5 (line 2 there), line 6 (line 3 there), line 10 (line 7 there), line 11 (line 8 there)"
    assert shared in str(overlap.reason("validation"))


def test_rows_that_a_template_refuses() -> None:
    made = ChatTemplate(tokenizer(), {"default": "{{ raise_exception('Never.') }}"}, {"eos_token": "</s>"})
    with pytest.raises(InvalidTrainingFile, match=r"Line 3: .*Never") as caught:
        check_examples([b"prompt,completion\n\na,b\nc,d\n"], template=made, least=1)
    assert caught.value.message.endswith("More rows are invalid: line 4.")


def test_a_row_of_another_shape_is_compared_with_the_first_by_its_line() -> None:
    chat = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]).replace('"', '""')
    with pytest.raises(InvalidTrainingFile, match=r"Line 5: .* messages as in line 3: the key 'messages'"):
        check_examples([f'messages,id\n\n"{chat}",1\n\n,2\n'.encode()], least=1)


def findings(path: Path, against: Path | None = None) -> dict[str, tuple[list[int], list[int]]]:
    return {one.kind: (one.lines, one.against) for one in maker.make(path, against).findings}


def test_a_report_and_what_it_compares_with(path: Path, tmp_path: Path) -> None:
    found = {kind: lines for kind, (lines, _) in findings(path).items()}
    assert {kind: found[kind] for kind in ("exact_duplicate", "invalid_row", "pii", "empty_output")} == {
        "exact_duplicate": DUPLICATES,
        "invalid_row": [INVALID],
        "pii": [MAIL],
        "empty_output": [EMPTY],
    }
    other = tmp_path / "other.csv"
    other.write_text('prompt,completion\n"x\ny",z\n"Mail me at\neve@example.org.",Fine.\n')
    assert findings(path, other)["test_leak"] == ([MAIL], [4])
    other.write_text("prompt,completion\n\nx,y,z\n")
    with pytest.raises(NothingToCompare, match=r"Line 3: .*Line 3: has 3 values"):
        maker.make(path, other)


def test_a_preview(path: Path) -> None:
    template = ChatTemplate(tokenizer(), {"default": CHATML}, {"bos_token": "<s>", "eos_token": "</s>"})
    made = preview.make([path.read_bytes()], template, encoder_of_any("assistant"), model="m", rows=9)
    assert [(row.number, row.name) for row in made.rows] == [
        (line, f"line {line}") for line in (2, WITH_BREAKS, 7, INVALID, MAIL, EMPTY)
    ]
    page = preview_page.draw(made, "rows.csv")
    assert f"<h2>Line {WITH_BREAKS}</h2>" in page
    assert f"not in line {INVALID}." in page


@pytest.mark.parametrize("line", PROMPTS)
def test_a_chosen_line_drops_the_row_that_begins_there(path: Path, tmp_path: Path, line: int) -> None:
    target = tmp_path / "clean.jsonl"
    done = cleaner.clean(path, target, Cleaning(rows=RowChoice(drop=[line])))
    assert [(one.line, one.kind) for one in done.dropped] == sorted([(line, "rows.drop"), (INVALID, "invalid_row")])
    assert (done.rows, done.clean.rows) == (6, 4)
    kept = [json.loads(row)["prompt"] for row in target.read_text().splitlines()]
    assert kept == [prompt for at, prompt in PROMPTS.items() if at != line]


@pytest.mark.parametrize(
    ("line", "nearest"), [(1, 2), (NEXT_LINE, WITH_BREAKS), (5, WITH_BREAKS), (6, WITH_BREAKS), (10, MAIL), (12, EMPTY)]
)
def test_a_line_on_which_no_row_begins_is_refused(path: Path, tmp_path: Path, line: int, nearest: int) -> None:
    with pytest.raises(InvalidValue, match=rf"6 rows, but none begins on line {line}; one does on line {nearest}\."):
        cleaner.clean(path, tmp_path / "clean.jsonl", Cleaning(rows=RowChoice(drop=[line, 2])))


def test_a_chosen_row_goes_though_the_report_does_not_reach_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maker, "MOST", 30)
    target = tmp_path / "clean.jsonl"
    done = cleaner.clean(path, target, Cleaning(rows=RowChoice(drop=[MAIL])))
    assert (done.judged, [one.line for one in done.dropped]) == (1, [INVALID, MAIL])
    assert "eve@" not in target.read_text()


def test_what_the_cleaner_says_of_rows(path: Path, tmp_path: Path) -> None:
    done = cleaner.clean(path, tmp_path / "clean.jsonl", Cleaning(recommended=True))
    assert [(one.line, one.kind) for one in done.dropped] == [
        (7, "exact_duplicate"),
        (INVALID, "invalid_row"),
        (EMPTY, "empty_output"),
    ]
    assert done.dropped[0].why.endswith("The other: line 2.")
    assert [(one.line, one.kind) for one in done.changed] == [(MAIL, "pii")]


def said_by(command: tuple[int, str, str]) -> str:
    return " ".join((command[1] + command[2]).split())


def test_the_commands(tunery: Run, path: Path, tmp_path: Path) -> None:
    assert f"Line {INVALID}: has 3 values" in said_by(tunery("files", "check", path))
    page, target = tmp_path / "page.html", tmp_path / "clean.jsonl"
    said = said_by(tunery("files", "report", path, "--html", page))
    shown = re.findall(r"(\d[\d, ]*) (?:The rows are|Contains|Invalid file)", said)
    assert shown == [f"{INVALID}", f"{MAIL}", "2, 7"]
    assert "counted by rows" not in said
    for lines in (f"line {INVALID}", f"line {MAIL}", "lines 2, 7", f"line {EMPTY}"):
        assert f'<span class="at">{lines}</span>' in page.read_text()
    assert f"one does on line {WITH_BREAKS}" in said_by(
        tunery("files", "clean", path, "--drop-line", NEXT_LINE, "-o", target)
    )
    status, out, err = tunery("files", "clean", path, "--drop-line", MAIL, "-o", target, "--json")
    done: dict[str, Any] = json.loads(out)
    assert (status, [one["line"] for one in done["dropped"]], done["counts"]["rows"]) == (0, [INVALID, MAIL], 6), err
