"""Other projects' clients need only another base URL, from an upload to a chat with the tuned model.

Each has its own venv or node folder, and uses the model name of code that was written for OpenAI.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import other_clients
import pytest
import stacks
from openai import OpenAI

from tunery.local.stack import Stack

DRIVERS = Path(__file__).parent / "clients"
ALIAS = "gpt-4o-mini-2024-07-18"
ASK: list[Any] = [{"role": "user", "content": "Question 99 about my cash"}]
PYTHON = ("litellm", "dspy", "llama-index", "langchain", "pydantic-ai", "openai-agents")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def alias(client: OpenAI, base: str) -> str:
    stacks.post(client, "/models/aliases", {"alias": ALIAS, "model": base})
    return ALIAS


def _drive(command: list[str], stack: Stack, alias: str, folder: Path) -> dict[str, Any]:
    """Returns what the client's driver reports at its end. The driver gets only an address and a key."""
    (folder / "train.jsonl").write_bytes(stacks.rows(24))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OPENAI_BASE_URL": f"{stack.api_url}/v1",
        "OPENAI_API_BASE": f"{stack.api_url}/v1",  # the older name, which llama-index reads
        "OPENAI_API_KEY": str(stack.first_key),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it downloads prices from GitHub
    }
    driven = subprocess.run(
        [*command, alias, str(folder / "train.jsonl")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert driven.returncode == 0, f"{driven.stdout}\n{driven.stderr}\n{stacks.logs(stack)}"
    said: dict[str, Any] = json.loads(driven.stdout.splitlines()[-1])
    return said


def _check(said: dict[str, Any], client: OpenAI) -> None:
    assert set(said["asked"]) == {ALIAS}
    assert said["model"].startswith(f"ft:{ALIAS}:tunery:")
    reply = client.chat.completions.create(model=said["model"], messages=ASK, temperature=0, max_completion_tokens=8)
    assert said["answer"] == reply.choices[0].message.content


@pytest.mark.parametrize("name", PYTHON)
def test_client_of_python(name: str, stack: Stack, client: OpenAI, alias: str, tmp_path: Path) -> None:
    python = other_clients.install(name) / "bin/python"
    driver = DRIVERS / f"drive_{name.replace('-', '_')}.py"
    _check(_drive([str(python), str(driver)], stack, alias, tmp_path), client)


def test_client_of_npm(stack: Stack, client: OpenAI, alias: str, tmp_path: Path) -> None:
    """The client's types also fit: `tsc` is strict."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    folder = other_clients.install("openai-npm")
    said = _drive(["node", str(folder / "out/drive.js")], stack, alias, tmp_path)
    _check(said, client)
    assert re.fullmatch(rf"ft:{ALIAS}:tunery:npm:\w{{8}}:ckpt-step-3", said["checkpoint"])
