"""The commands that a model's page and README show, run verbatim with the programs that they name."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import go_templates
import httpx2
import llama_cpp
import other_clients
import pytest
import real_vllm
import rows
import tiny_models
from cloned_databases import Database
from run_folders import Ear, lay_out, plan, said
from teams import BASE, Team

from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models.model import Model
from tunery.spec import Export, Lora
from tunery.storage import open_storage
from worker.trainer.export import gguf_writer
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROOT = Path(__file__).parents[2]
ANSWER = "all is blue"
ROW = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]}
SHAPE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32, for vLLM
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder. Its model learned one answer, and to end it with a token that ends no answer of its base."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_models.llama(folder / "base", bf16=True, eos_token_id=0, initializer_range=0.05, **SHAPE)
    tiny_models.with_a_merge(base)
    export = Export(merged=True, fp8=True, gguf=["f16"], adapter_gguf=True)
    asked = plan(technique=Lora(r=4, alpha=8), n_epochs=60, export=export)
    lay_out(folder / "run", base, asked, [ROW] * 8)
    ear = Ear()
    assert carry_out(folder / "run", MessageWriter(ear.descriptor), StopSignal())
    assert not [export.message for export in said(ear, "exported") if export.is_refused]
    ear.close()
    return folder


@dataclass(frozen=True)
class Shown:
    """A model's commands, and the folder in which they run. `programs`: a folder on the PATH, for the engines."""

    folder: Path
    programs: Path
    environment: dict[str, str]
    commands: dict[tuple[str, str], str]

    def run(self, engine: str, files: str = "") -> str:
        """Runs a command and returns what it prints."""
        ran = subprocess.run(
            ["bash", "-c", self.commands[engine, files]],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def chat(self, files: str) -> str:
        """Starts llama.cpp's server by a command and returns its answer to a greeting."""
        command = ["bash", "-c", f"exec {self.commands['llama.cpp', files]}"]
        log = self.folder / "llama.log"
        with llama_cpp.listening(command, log, cwd=self.folder, env=self.environment) as address:
            return said_at(address)


def said_at(address: str, **more: Any) -> str:
    """An OpenAI-compatible server's answer to a greeting."""
    asked: Any = {"messages": ROW["messages"][:1], "temperature": 0, "max_tokens": 64, **more}
    found = httpx2.post(f"{address}/v1/chat/completions", json=asked, trust_env=False, timeout=120).raise_for_status()
    choice = found.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


@pytest.fixture
def shown(database: Database, team: Team, live: str, trained: Path, tmp_path: Path) -> Shown:
    """The commands of the model's page. The first one, the download, has been run."""
    storage = open_storage(database.settings)

    def publish(session: Any, model: Model, prefix: str, folder: Path) -> None:
        listed, sha256 = manifest.publish(storage, prefix, folder)
        model.prefix, model.manifest, model.manifest_sha256 = prefix, listed.model_dump(mode="json"), sha256
        artifacts.record(session, model, listed)

    with database.sessions.begin() as session:
        publish(session, rows.base(session, BASE), "models/base", trained / "base")
        job = rows.job(session, session.get_one(Project, team.id), base_model=BASE)
        rows.bring(session, job, State.SUCCEEDED)
        model = session.get_one(Model, job.tuned_model)
        publish(session, model, "models/tuned", trained / "run/out")
    found = team.http.get(f"/v1/models/{model.id}/engines").json()["data"]
    programs = tmp_path / "programs"
    programs.mkdir()
    environment = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "TUNERY_API_URL": live,
        "TUNERY_API_KEY": team.key,
        # For llama.cpp: any free port, one thread, and room for one chat.
        "LLAMA_ARG_PORT": "0",
        "LLAMA_ARG_THREADS": "1",
        "LLAMA_ARG_CTX_SIZE": "256",
        "LLAMA_ARG_N_PARALLEL": "1",
    }
    commands = {(each["engine"], each["files"]): each["command"] for each in found}
    page = Shown(tmp_path, programs, environment, commands)
    page.run("download")
    return page


def test_plain_libraries_answer_by_the_pages_commands(shown: Shown) -> None:
    assert shown.run("peft") == ANSWER
    assert shown.run("transformers", "merged") == ANSWER
    assert shown.run("transformers", "fp8") == ANSWER


def test_llama_cpp_answers_by_the_pages_commands(shown: Shown, trained: Path) -> None:
    llama_cpp.write_program(other_clients.install("llama-cpp") / "bin/python", shown.programs)
    gguf_writer.write(trained / "base", out=shown.folder / "BASE.gguf", kind="f16", name="tiny")
    assert shown.chat("gguf/model-f16.gguf") == ANSWER
    assert shown.chat("gguf/adapter-f32.gguf") == ANSWER


@pytest.mark.vllm
@pytest.mark.parametrize("files", ["", "merged", "fp8"], ids=["adapter", "merged", "fp8"])
def test_vllm_answers_by_the_pages_commands(shown: Shown, files: str) -> None:
    (shown.programs / "vllm").symlink_to(real_vllm.PYTHON.with_name("vllm"))
    with real_vllm.running(shown.commands["vllm", files], shown.folder, shown.environment) as port:
        assert said_at(f"http://127.0.0.1:{port}", model="tuned") == ANSWER


def test_ollamas_file_describes_the_model_that_llama_cpp_loads(shown: Shown) -> None:
    """ollama is in no package. It resolves paths from the Modelfile's folder, and its templates are those of Go."""
    assert shown.commands["ollama", "gguf/Modelfile"] == (
        "ollama create tuned -f tuned/gguf/Modelfile && ollama run tuned"
    )
    modelfile = shown.folder / "tuned/gguf/Modelfile"
    said = modelfile.read_text()
    [weights] = re.findall(r"^FROM (.+)$", said, re.MULTILINE)
    [template] = re.findall(r'^TEMPLATE """(.*?)"""$', said, re.MULTILINE | re.DOTALL)
    stops = re.findall(r'^PARAMETER stop "(.+)"$', said, re.MULTILINE)
    prompt = go_templates.render(template, [("user", "Hello")])
    python = other_clients.install("llama-cpp") / "bin/python"
    with llama_cpp.serve(python, modelfile.parent / weights) as server:
        found = server.call("completion", prompt=prompt, temperature=0, n_predict=64, stop=stops)
    assert found["content"] == ANSWER


def test_the_readme_shows_the_pages_commands(shown: Shown) -> None:
    readme = (shown.folder / "tuned/README.md").read_text()
    commands = {key: command for key, command in shown.commands.items() if key != ("download", "")}
    assert re.findall(r"^    (.+)$", readme, re.MULTILINE)[1:] == [*commands.values()]
    assert "    tunery jobs download ftjob-test --with-base -o tuned\n" in readme
