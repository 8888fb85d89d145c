"""A base in a folder is asked about the ends of a local file's answers."""

import json
from pathlib import Path

import doubtful_answers
import pytest
import tiny_models

from tunery.cli import report
from tunery.datasets.report.rows import Row, Turn
from tunery.local import answer_ends
from tunery.rows.answer_losses import MOST_PARAMS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a random two-layer Llama."""
    return tiny_models.llama(tmp_path_factory.mktemp("tiny") / "base")


def test_the_ends_of_each_row(tiny: Path) -> None:
    ask = answer_ends.asking(tiny, 256)
    assert ask is not None
    said = [(4, "Hello ther"), (9, "Hello."), (12, "w" * 300)]
    rows = [
        Row(line, (Turn("system", "Be kind."), Turn("user", "Hi?"), Turn("assistant", text))) for line, text in said
    ]
    found = ask(rows)
    assert {line: one.line for line, one in found.items()} == {4: 1, 9: 2}, "the third has too many tokens"
    assert (found[4].goes_on is None, found[9].goes_on is None) == (False, True)


def test_only_a_base_that_a_cpu_runs_is_asked(tmp_path: Path) -> None:
    assert answer_ends.asking(tmp_path, 256) is None
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * MOST_PARAMS)
    assert answer_ends.asking(tmp_path, 256) is not None
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * MOST_PARAMS + 1)
    assert answer_ends.asking(tmp_path, 256) is None


def test_a_base_that_does_not_run_leaves_the_report_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"none")
    ask = answer_ends.asking(tmp_path, 256)
    assert ask is not None
    assert ask([Row(1, (Turn("user", "Hi?"), Turn("assistant", "Hello")))]) == {}
    assert f"without {tmp_path}" in caplog.text


def test_a_local_file_s_report_asks_its_base(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chats = [[{"role": turn.role, "content": turn.text} for turn in row.turns] for row in doubtful_answers.rows()]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    counts = [report.make(path, None, base=base, max_tokens=256)["counts"] for base in (None, str(tiny))]
    assert [found.get("truncated_output") for found in counts] == [None, 2], "a random base finds that letters go on"
