"""Sources that cannot be a base are refused, with a message that says what to change."""

from pathlib import Path

import pytest
import tiny_models

from tunery.errors import UnusableModel
from worker.trainer import gguf_files
from worker.trainer.convert import convert


def test_folder_that_is_not_empty_is_left_as_it_is(tmp_path: Path) -> None:
    source = tiny_models.llama(tmp_path / "source")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("mine")

    with pytest.raises(UnusableModel, match="is not empty"):
        convert(str(source), tmp_path / "base")

    assert [path.name for path in (tmp_path / "base").iterdir()] == ["mine.txt"]


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    source = tiny_models.llama(tmp_path / "source")
    (source / "config.json").unlink()

    with pytest.raises(UnusableModel, match=r"no config\.json"):
        convert(str(source), tmp_path / "base")


def test_byte_pair_tokenizer_of_an_unknown_rule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another pre-tokenisation rule would split words into other tokens than the model was trained on."""
    monkeypatch.setattr(gguf_files, "_tokenizer_info", lambda _path: ("gpt2", "something-new", set()))

    with pytest.raises(UnusableModel, match="the unsupported rule 'something-new'"):
        gguf_files.unpack(tmp_path / "none.gguf", tmp_path / "out")
