"""A plug-in's back end answers chats in a real model server, through the API."""

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI
from teams import ALIAS, BASE, Team

from tunery import processes
from tunery.settings import Settings

ROOT = Path(__file__).parents[2]


def environment(port: int, name: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests/fixtures"),
        "TUNERY_PLUGINS": "toy_backend",
        "TUNERY_SERVER_BACKEND": name,
        "TUNERY_SERVER_URL": f"http://127.0.0.1:{port}",
    }


@pytest.fixture
def address(settings: Settings, tmp_path: Path) -> Iterator[str]:
    port = processes.free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        server = processes.spawn(
            [sys.executable, "-m", "worker.server"], output=log, cwd=ROOT, env=environment(port, "echo")
        )
    try:
        alive = processes.wait_until(lambda: answers(url), seconds=60, alive=lambda: server.poll() is None)
        assert alive, processes.tail(tmp_path / "log")
        yield url
    finally:
        processes.stop(server, (signal.SIGTERM, 20))


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", trust_env=False).is_success
    except httpx2.HTTPError:
        return False


@pytest.fixture
def client(address: str, make_app: Callable[..., FastAPI], team: Team, base: str) -> OpenAI:
    return team.on(make_app(server_url=address)).openai(strict=True)


def test_plug_ins_back_end_answers_a_chat(client: OpenAI, address: str) -> None:
    asked: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "say it again"}]
    answer = client.chat.completions.create(model=ALIAS, messages=asked)
    assert answer.choices[0].message.content == f"say it again {BASE} "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)
    pieces = client.chat.completions.create(model=BASE, messages=asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == f"say it again {BASE} "
    health = httpx2.get(f"{address}/healthz", trust_env=False).json()
    assert (health["model"], health["device"]) == (BASE, "none")
    with pytest.raises(openai.BadRequestError, match="Ask something else"):
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "refuse"}])


def test_chat_reads_no_certificates_once_they_are_read(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them blocks the event loop, and so every stream, for tens of milliseconds."""
    asked: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "again"}]
    client.chat.completions.create(model=BASE, messages=asked)
    read: list[object] = []
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *args, **_: read.append(args))
    client.chat.completions.create(model=BASE, messages=asked)
    assert read == []


def test_server_imports_no_torch_before_its_devices_are_chosen() -> None:
    script = "import sys, worker.server.__main__; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.usefixtures("settings")
def test_unknown_back_end_ends_the_server_and_names_those_that_exist() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "worker.server"],
        cwd=ROOT,
        env=environment(1, "vlm"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert "TUNERY_SERVER_BACKEND is 'vlm'; use embedded or vllm or echo" in ran.stderr
