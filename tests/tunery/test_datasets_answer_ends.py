"""A base in a folder is asked about the ends of a file's answers."""

import json
from pathlib import Path

import doubtful_answers
import pytest
import tiny_models
from typer.testing import CliRunner

from tunery.cli import report
from tunery.cli.main import app
from tunery.datasets.report import __main__ as report_program
from tunery.datasets.report import answer_ends
from tunery.datasets.report.order import Order
from tunery.datasets.report.rows import Row, Turn
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


@pytest.fixture
def doubtful(tmp_path: Path) -> Path:
    """Returns a file with two answers of which a random base finds that their last words go on."""
    path = tmp_path / "rows"
    chats = [[{"role": turn.role, "content": turn.text} for turn in row.turns] for row in doubtful_answers.rows()]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.mark.slow
def test_a_local_file_s_report_asks_its_base(tiny: Path, doubtful: Path) -> None:
    counts = [report.make(doubtful, None, base=base, max_tokens=256)["counts"] for base in (None, str(tiny))]
    assert [found.get("truncated_output") for found in counts] == [None, 2]


@pytest.mark.slow
def test_a_local_file_s_cleaning_asks_its_base(tiny: Path, doubtful: Path) -> None:
    asked = ["files", "clean", str(doubtful), "-o", str(doubtful.with_name("clean")), "--drop", "truncated_output"]
    done = CliRunner().invoke(app, [*asked, "--base", str(tiny), "--max-tokens", "256", "--json"])
    assert done.exit_code == 0, done.output
    assert [row["line"] for row in json.loads(done.stdout)["dropped"]] == [9, 30]


@pytest.mark.slow
def test_a_worker_s_report_asks_its_base_about_what_was_not_measured(tiny: Path, doubtful: Path) -> None:
    folder = doubtful.parent
    for name in ("base", "weights"):
        (folder / name).symlink_to(tiny)
    (folder / "others").mkdir()
    (folder / "order.json").write_text(Order(base="tiny", max_tokens=256).model_dump_json())
    said = {"tokens": 9, "loss": 2, "alone": 3, "end": -4, "goes_on": -9}
    (folder / "losses.json").write_text(json.dumps([{"line": 9, **said}]))

    assert report_program.main(folder) == 0

    found = json.loads((folder / "report.json").read_text())["findings"]
    assert [30] in [one["lines"] for one in found if one["kind"] == "truncated_output"]
