"""The models that are fetched on demand: how each is found, registered and fetched."""

import re
from pathlib import Path

import pytest

from tunery.local import bases, paths


def test_a_base_that_was_not_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    with pytest.raises(bases.NoModel, match=r"gemma-3-270m in .*gemma3-270m.*make demo BASE=gemma3"):
        bases.GEMMA3.gguf()
    with pytest.raises(bases.NoModel, match=r"SmolLM2.*make setup"):
        bases.SMOLLM2.gguf()


def test_a_fetched_base_is_registered_with_its_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    for base in bases.BASES.values():
        (tmp_path / base.folder).mkdir(parents=True)
        (tmp_path / base.folder / "model.gguf").touch()
    body = bases.named("gemma3").registration()
    assert body["source"] == str(tmp_path / ".vendor/gemma3-270m/model.gguf")
    assert "<end_of_turn>" in body["chat_template"]
    assert bases.named("smollm2").registration().keys() == {"id", "source"}, "a template of its own"


def test_an_unknown_base_is_refused_with_the_known_ones() -> None:
    with pytest.raises(bases.UnknownBase, match="smollm2, gemma3"):
        bases.named("gpt-5")


def test_makefile_fetches_each_base_where_it_is_looked_for() -> None:
    makefile = (paths.root() / "Makefile").read_text()
    folders = dict(re.findall(r"^(SMOLLM2|GEMMA3) = (\S+)$", makefile, flags=re.MULTILINE))
    assert bases.GEMMA3.folder == folders["GEMMA3"]
    assert Path(bases.SMOLLM2.folder).parent == Path(folders["SMOLLM2"])
    for name, target in re.findall(r"\$\(filter (\w+),\$\(BASE\)\),\$\((\w+)\)/installed", makefile):
        assert bases.named(name) is getattr(bases, target)
