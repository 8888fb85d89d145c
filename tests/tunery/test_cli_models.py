"""`tunery models ...`, and downloads of models and jobs."""

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import rows
import tiny_models
from cloned_databases import Database
from commands import Run, publish
from rich.console import Console
from teams import BASE

from tunery.cli import stack as stack_commands
from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.keys import projects
from tunery.local.bases import SMOLLM2
from tunery.local.stack import Stack
from tunery.models import exports, imports
from tunery.models.model import Model
from tunery.storage import open_storage


def _finished(database: Database, **values: object) -> str:
    with database.sessions.begin() as session:
        return rows.job(session, projects.find_project(session, "default"), State.SUCCEEDED, **values).id


def _model(database: Database, job: str) -> str:
    with database.sessions() as session:
        return str(session.get_one(Job, job).tuned_model)


def test_download_brings_every_file_and_checks_it(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    job, folder = _finished(database), tmp_path / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "deep/weights.bin").write_bytes(bytes(range(256)))
    prefix = publish(database, _model(database, job), folder)
    assert tunery("jobs", "download", job, "-o", tmp_path / "got")[0] == 0
    assert (tmp_path / "got/deep/weights.bin").read_bytes() == bytes(range(256))

    storage = open_storage(database.settings)
    storage.delete(f"{prefix}/deep/weights.bin")
    storage.put(f"{prefix}/deep/weights.bin", bytes(256))
    status, _, err = tunery("jobs", "download", job, "-o", tmp_path / "again")
    assert status == 1
    assert "sha256" in err
    assert not list((tmp_path / "again/deep").iterdir())


# --- models -------------------------------------------------------------------------------------------------------


def test_models_are_registered_listed_and_named_again(
    tunery: Run, api: str, database: Database, tmp_path: Path
) -> None:
    with database.sessions.begin() as session:
        rows.base(session, BASE)
    assert BASE in tunery("models", "list")[1]
    assert tunery("models", "alias", "gpt-4o-mini-2024-07-18", BASE)[0] == 0
    assert f"alias of {BASE}" in tunery("models", "list")[1]
    (tmp_path / "some-model").mkdir()
    status, out, _ = tunery("models", "add", "mine", "some-model", "--no-wait")
    assert (status, out) == (0, "✓ mine is processing\n")
    with database.sessions() as session:  # a worker runs in another folder, so the path that was sent is absolute
        assert session.get_one(Model, "mine").source == str(tmp_path / "some-model")


def test_a_model_is_registered_with_a_chat_template(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }} é\n")
    assert tunery("models", "add", "mine", "org/m", "--chat-template", "chat.jinja", "--no-wait")[0] == 0
    with database.sessions() as session:
        assert session.get_one(Model, "mine").chat_template == "{{ messages }} é\n"
    status, _, err = tunery("models", "add", "other", "org/m", "--chat-template", "none.jinja", "--no-wait")
    assert status == 1
    assert "none.jinja cannot be read" in err


def test_an_adapter_is_imported(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    with database.sessions.begin() as session:
        rows.base(session, BASE)
    folder = tmp_path / "mine"
    (folder / "additional_chat_templates").mkdir(parents=True)
    sent = ("adapter_config.json", "adapter_model.safetensors", "additional_chat_templates/a.jinja")
    for name in (*sent, "optimizer.pt"):
        (folder / name).write_text(name)

    status, out, err = tunery("models", "import", BASE, folder, "--suffix", "mine", "--no-wait")

    assert status == 0, err
    with database.sessions() as session:
        model = session.get_one(Model, out.strip())
    assert (model.status, model.source, model.technique) == ("processing", "mine.zip", "lora")
    packed = b"".join(open_storage(database.settings).read(imports.archive_key(model.prefix)))
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        found = {name: archive.read(name).decode() for name in archive.namelist()}
    assert found == {name: name for name in sent}
    (folder / "adapter_config.json").unlink()
    status, _, err = tunery("models", "import", BASE, folder)
    assert status == 1
    assert "has no adapter_config.json" in err


def test_models_that_are_being_converted_are_listed(tunery: Run, api: str, database: Database) -> None:
    assert "No models yet" in tunery("models", "list")[2]
    with database.sessions.begin() as session:
        rows.base(session, "late", status="processing")
        rows.base(session, "broken", status="error")
    listed = {line.split()[0]: line.split()[3] for line in tunery("models", "list")[1].splitlines()}
    assert listed == {"ID": "STATUS", "late": "processing", "broken": "error"}


def test_a_model_without_files_is_not_downloaded(tunery: Run, api: str, database: Database) -> None:
    with database.sessions.begin() as session:
        rows.base(session, "late", status="processing")
    status, out, err = tunery("models", "download", "late")
    assert (status, out) == (1, "")
    assert "late has no files to download: it is processing." in err


LOAD = """
import sys, torch
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, type(model.base_model.model).__name__, model.peft_config["default"].r)
"""


def _load(folder: Path, cwd: Path) -> str:
    """Loads a model as somebody who has only PEFT: no hub, no Tunery, in another folder."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", LOAD, str(folder)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_model_is_exported(tunery: Run, api: str, database: Database) -> None:
    model = _model(database, _finished(database))
    formats = ("--format", "merged", "--format", "gguf-q8_0")

    assert tunery("models", "export", model, *formats, "--no-wait")[0] == 0

    with database.sessions() as session:
        row = session.get_one(Model, model)
        assert row.export is not None
        assert row.export["asked"] == {"merged": True, "gguf": ["q8_0"], "fp8": False, "adapter_gguf": False}


@pytest.mark.parametrize("is_refused", [False, True])
def test_command_waits_for_the_export(tunery: Run, api: str, database: Database, is_refused: bool) -> None:
    model = _model(database, _finished(database))
    result = {"path": "merged", "message": "What came of it", "is_refused": is_refused}
    worker = threading.Thread(target=_finish_export, args=(database, model, result))
    worker.start()
    status, out, err = tunery("models", "export", model, "--format", "merged")
    worker.join()
    assert status == is_refused
    assert "merged: What came of it" in (err if is_refused else out)


def _finish_export(database: Database, model: str, result: dict[str, object]) -> None:
    """Finishes the model's next export as a worker does."""
    while True:
        with database.sessions.begin() as session:
            if model in exports.waiting(session):
                exports.finish(session, model, results=[result])
                return


@pytest.mark.slow
def test_plain_peft_loads_what_was_downloaded_with_its_base(
    tunery: Run, api: str, database: Database, tmp_path: Path
) -> None:
    with database.sessions.begin() as session:
        rows.base(session, "tiny")
    job = _finished(database, base_model="tiny")
    base, adapter = tiny_models.llama(tmp_path / "made-base"), tmp_path / "made-adapter"
    tiny_models.lora(adapter, base)
    named = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tiny"}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    publish(database, "tiny", base)
    publish(database, _model(database, job), adapter)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for command in (("jobs", "download", job), ("models", "download", _model(database, job))):
        got = tmp_path / f"got-{command[0]}"
        assert tunery(*command, "--with-base", "-o", got)[0] == 0
        assert (got / "base/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        assert json.loads((got / "adapter_config.json").read_text())["base_model_name_or_path"] == str(got / "base")
    assert _load(tmp_path / "got-jobs", elsewhere) == "PeftModelForCausalLM LlamaForCausalLM 4"
    assert "needs no base" in tunery("models", "download", "tiny", "--with-base")[2]
    assert (tmp_path / "tiny/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_up_waits_for_a_base_that_an_interrupted_start_left_half_converted(
    api: str, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with database.sessions.begin() as session:
        rows.base(session, SMOLLM2.id, status="processing")

    def convert() -> None:
        with database.sessions.begin() as session:
            session.get_one(Model, SMOLLM2.id).status = "ready"

    stack = Stack(Path("home"))
    stack.api_url = api
    stack.postgres.url = lambda: database.settings.database_url  # type: ignore[method-assign]
    worker = threading.Timer(1, convert)
    worker.start()
    stack_commands.register(stack, None, Console(highlight=False))
    assert not worker.is_alive(), "it returned while the base was being converted"
    assert f"Base model    {SMOLLM2.id}" in capsys.readouterr().out
    stack_commands.register(stack, None, Console(highlight=False))
    assert capsys.readouterr().out == ""
