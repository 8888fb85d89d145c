"""Other projects' clients get structured output: by a schema, by a tool call, and by the Responses API."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import other_clients
import pytest
import stacks
import tiny_models
from openai import OpenAI

from tunery.local.stack import Stack

DRIVERS = Path(__file__).parent / "clients"
ALIAS = "gpt-4o-2024-08-06"
"""llama-index accepts only model names whose context length it knows."""
WAYS = {
    "langchain": {"json_schema", "function_calling", "responses"},
    "pydantic-ai": {"chat_tool", "chat_native", "responses_tool", "responses_native"},
    "openai-agents": {"responses", "chat"},
    "llama-index": {"structured"},
    "dspy": {"chat", "json"},
    "instructor": {"tools", "tools_strict", "json_schema", "responses_tools"},
}
BY_PROMPT = {"instructor": {"json", "json_schema", "md_json"}, "langchain": {"json_mode"}}
"""Modes that give the schema in the prompt alone: the model has to be tuned to follow it."""
CARD = {"colour": "blue", "lost": True}
TOOL = {
    "type": "function",
    "function": {
        "name": "Card",
        "description": "A payment card.",
        "parameters": {
            "properties": {
                "colour": {"enum": ["red", "blue"], "title": "Colour", "type": "string"},
                "lost": {"title": "Lost", "type": "boolean"},
            },
            "required": ["colour", "lost"],
            "type": "object",
        },
    },
}
"""The card as a tool, as instructor sends it."""
SCHEMA = (
    'Answer the user as an expert, with JSON by this schema: {"properties": {"colour": {"enum": ["red", "blue"], '
    '"type": "string"}, "lost": {"type": "boolean"}}, "required": ["colour", "lost"]}. Return an instance of it, not '
    "the schema itself. ```json"
)
OF_NPM = {f"{api}_{way}" for api in ("responses", "chat") for way in ("object", "stream", "tool")}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def caller(stack: Stack, client: OpenAI, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base of random weights whose template renders tools: only constrained decoding makes its answers fit."""
    folder = tiny_models.llama(
        tmp_path_factory.mktemp("hub") / "caller", seed=5, template=tiny_models.CALLS, max_position_embeddings=8192
    )
    stacks.post(client, "/models/aliases", {"alias": ALIAS, "model": stacks.add_base(stack, client, folder, "caller")})
    return ALIAS


class Cards:
    """Tunes models until they answer every prompt with one card."""

    def __init__(self, stack: Stack, client: OpenAI, root: Path) -> None:
        self._stack, self._client, self._root = stack, client, root

    def tune(self, name: str, rows: list[dict[str, Any]], template: str = tiny_models.CHATML) -> str:
        stack, client = self._stack, self._client
        folder = tiny_models.llama(
            self._root / name,
            seed=5, hidden_size=64, intermediate_size=128, initializer_range=0.05, max_position_embeddings=8192,
            template=template,
        )  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        job = client.fine_tuning.jobs.create(
            model=stacks.add_base(stack, client, folder, name),
            training_file=stacks.upload(client, f"{name}.jsonl", lines.encode()),
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 25, "batch_size": 4}}},
            seed=7,
            extra_body={"technique": {"type": "full"}, "learning_rate": 0.003},
        )
        return str(stacks.finish(stack, client, job.id).fine_tuned_model)


@pytest.fixture(scope="module")
def cards(stack: Stack, client: OpenAI, tmp_path_factory: pytest.TempPathFactory) -> Cards:
    return Cards(stack, client, tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def card_model(cards: Cards) -> str:
    """A model that answers with the card as JSON."""
    words, dice = SCHEMA.split(), random.Random(1)
    rows = [
        [
            {"role": "system", "content": " ".join(dice.choices(words, k=length))},
            {"role": "user", "content": f"A red card is gone. {' '.join(dice.choices(words, k=length % 7 * 4))}"},
            {"role": "assistant", "content": json.dumps(CARD)},
        ]
        for length in (1, 4, 10, 20, 30, 40, 60, 85) * 5
    ]
    return cards.tune("cards", [{"messages": row} for row in rows])


def drive(command: list[str], stack: Stack, folder: Path, model: str = ALIAS) -> dict[str, dict[str, object]]:
    """Returns a driver's result for each way of asking. The driver gets only an address, a key and a model's name."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OPENAI_BASE_URL": f"{stack.api_url}/v1",
        "OPENAI_API_BASE": f"{stack.api_url}/v1",
        "OPENAI_API_KEY": str(stack.first_key),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else dspy's client downloads prices from GitHub
    }
    driven = subprocess.run(
        [*command, model],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert driven.returncode == 0, f"{driven.stdout}\n{driven.stderr}\n{stacks.logs(stack)}"
    found: dict[str, dict[str, object]] = json.loads(driven.stdout.splitlines()[-1])
    return found


@pytest.mark.usefixtures("caller")
@pytest.mark.parametrize("name", WAYS)
def test_a_client_gets_what_it_asks_for(name: str, stack: Stack, tmp_path: Path) -> None:
    python = other_clients.install(name) / "bin/python"
    found = drive([str(python), str(DRIVERS / f"ask_{name.replace('-', '_')}.py")], stack, tmp_path)
    assert found.keys() == WAYS[name]
    assert all(card["colour"] in ("red", "blue") for card in found.values())


@pytest.mark.parametrize("name", BY_PROMPT)
def test_a_client_reads_json_out_of_a_tuned_models_answer(
    name: str, stack: Stack, card_model: str, tmp_path: Path
) -> None:
    python = other_clients.install(name) / "bin/python"
    found = drive([str(python), str(DRIVERS / f"json_{name}.py")], stack, tmp_path, card_model)
    assert found == dict.fromkeys(BY_PROMPT[name], CARD)


def test_a_client_reads_a_call_that_a_tuned_model_makes_unasked(stack: Stack, cards: Cards, tmp_path: Path) -> None:
    """With instructor's parallel tools, the model itself chooses whether to call one."""
    function = {"name": "Card", "arguments": json.dumps(CARD)}
    row = [
        {"role": "user", "content": "A red card is gone."},
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
    ]
    model = cards.tune("callers", [{"messages": row, "tools": [TOOL]}] * 40, tiny_models.CALLS)
    python = other_clients.install("instructor") / "bin/python"
    found = drive([str(python), str(DRIVERS / "calls_instructor.py")], stack, tmp_path, model)
    assert found == {"parallel_tools": CARD}


@pytest.mark.usefixtures("caller")
def test_the_ai_sdk_of_npm_gets_what_it_asks_for(stack: Stack, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    found = drive(["node", str(other_clients.install("ai-sdk-npm") / "ask.js")], stack, tmp_path)
    assert found.keys() == OF_NPM
    assert all(card["colour"] in ("red", "blue") for card in found.values())
