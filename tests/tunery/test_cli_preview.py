"""`tunery files preview` shows what is learned from a file, with a local folder or a base of the server."""

import json
from pathlib import Path
from typing import Any

import pytest
import rows
from cloned_databases import Database
from commands import Run
from rich.console import Console
from templates import CHATML, model_folder

from tunery.artifacts import manifest
from tunery.cli import output
from tunery.storage import open_storage

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\nb"}]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "chatml", CHATML)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 5)
    return path


def test_marks_show_what_is_learned_without_colours(tunery: Run, base: Path, file: Path) -> None:
    status, said, _ = tunery("files", "preview", file, "--model", base, "-n", 1)

    assert status == 0
    assert "Example 1  4 trained, " in said
    assert "<|im_start|>assistant↵\n⟦a↵\nb<|im_end|>⟧↵" in said
    assert "✓ The token that ends a turn is learned at the end of every answer" in said


def test_colours_take_the_place_of_marks(tunery: Run, base: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coloured_console(**options: Any) -> Console:
        return Console(force_terminal=True, color_system="standard", **options)

    monkeypatch.setattr(output, "literal_console", coloured_console)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = tunery("files", "preview", file, "--model", base, "-n", 1)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = tunery("files", "preview", file, "--model", base, "-n", 1)[1]

    assert "\x1b[1;32ma↵" in coloured
    assert "⟦" not in coloured
    assert "⟦a↵" in plain
    assert "32m" not in plain


def test_failed_check_ends_with_1_and_says_what_to_change(tunery: Run, base: Path, file: Path) -> None:
    status, said, _ = tunery("files", "preview", file, "--model", base, "-n", 2, "--max-tokens", 20)

    assert status == 1
    assert "✗ Every sequence has tokens that are learned: not in example 1, example 2. Raise max_seq_length" in said


def test_page_and_json_are_written(tunery: Run, base: Path, file: Path, tmp_path: Path) -> None:
    status, said, _ = tunery(
        "files", "preview", file, "--model", base, "--json", "--loss-on", "all", "--html", tmp_path / "page.html"
    )

    made = json.loads(said)
    assert (status, made["model"], len(made["rows"])) == (0, "chatml", 3)
    assert made["rows"][0]["sequences"][0]["masked"] == 1
    assert '<span class="t" title=' in (tmp_path / "page.html").read_text()


def test_base_of_the_server_is_asked_and_nothing_stays_there(
    tunery: Run, api: str, database: Database, base: Path, file: Path
) -> None:
    published, sha256 = manifest.publish(open_storage(database.settings), "models/there", base)
    with database.sessions.begin() as session:
        described = {"manifest": published.model_dump(mode="json"), "manifest_sha256": sha256}
        rows.base(session, "there", prefix="models/there", **described)

    here = tunery("files", "preview", file, "--model", base)[1]
    assert tunery("files", "preview", file, "--model", "there")[:2] == (0, here)
    assert tunery("files", "list")[1] == ""

    id = tunery("files", "upload", file)[1].strip()
    assert tunery("files", "preview", id, "--model", "there")[:2] == (0, here)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--loss-on", "users"), "use assistant, last_assistant, all"),
        (("-n", 30), "less than or equal to 20"),
    ],
)
def test_wrong_options_are_refused(
    tunery: Run, base: Path, file: Path, arguments: tuple[object, ...], words: str
) -> None:
    status, said, errors = tunery("files", "preview", file, "--model", base, *arguments)
    assert (status, words in " ".join((said + errors).split())) == (2, True), errors


def test_a_name_that_is_neither_file_nor_id_is_refused(tunery: Run, base: Path) -> None:
    status, _, errors = tunery("files", "preview", "nowhere.jsonl", "--model", base)
    assert (status, "nowhere.jsonl: no such file" in " ".join(errors.split())) == (2, True), errors


def test_folder_without_a_tokenizer_is_named(tunery: Run, file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, _, errors = tunery("files", "preview", file, "--model", tmp_path / "empty")
    assert (status, "tokenizer.json" in errors) == (2, True), errors
