"""Plug-ins: what an operator names is imported, and each kind of process imports only its own part."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.main import create_app
from tunery import plugins
from tunery.errors import PluginFailed
from tunery.settings import Settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path. Modules imported from it are removed after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_package_is_imported_with_the_part_of_this_process_alone(folder: Path) -> None:
    (folder / "toy_package").mkdir()
    for name in ("__init__", "api", "trainer"):
        (folder / "toy_package" / f"{name}.py").touch()

    plugins.load(["toy_package"], "trainer")

    assert {"toy_package", "toy_package.trainer"} <= set(sys.modules)
    assert "toy_package.api" not in sys.modules


def test_package_without_a_part_and_a_single_file_are_imported(folder: Path) -> None:
    (folder / "toy_package").mkdir()
    (folder / "toy_package" / "__init__.py").touch()
    (folder / "toy_file.py").touch()

    plugins.load(["toy_package", "toy_file"], "server")

    assert {"toy_package", "toy_file"} <= set(sys.modules)


@pytest.mark.parametrize("text", [None, "import missing_dependency", "1 / 0", "def"])
def test_what_cannot_be_imported_is_named(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / "toy_broken.py").write_text(text)

    with pytest.raises(PluginFailed, match=r"'toy_broken' cannot be imported .*TUNERY_PLUGINS"):
        plugins.load(["toy_broken"], "api")


def test_part_that_cannot_be_imported_is_no_absent_one(folder: Path) -> None:
    (folder / "toy_package").mkdir()
    (folder / "toy_package" / "__init__.py").touch()
    (folder / "toy_package" / "worker.py").write_text("import missing_dependency")

    with pytest.raises(PluginFailed, match="missing_dependency"):
        plugins.load(["toy_package"], "worker")


def test_settings_and_trainer_read_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    assert Settings().plugins == plugins.names() == ()

    monkeypatch.setenv(plugins.VARIABLE, " one, two.parts,,")

    assert Settings().plugins == plugins.names() == ("one", "two.parts")


def test_api_does_not_start_without_its_plug_in(settings: Settings) -> None:
    with pytest.raises(PluginFailed, match="'toy_that_is_nowhere'"):
        create_app(settings.model_copy(update={"plugins": ("toy_that_is_nowhere",)}))
