"""A model is tuned on examples and then on preferences, through the official client on a running Tunery."""

import json
from pathlib import Path
from typing import Any

import pytest
import stacks
from openai import OpenAI

from tunery.local.stack import Stack

QUICK = {"max_new_tokens": 4, "general": {"items": 10, "prompts": 4}}


def _pairs(number: int, start: int = 0) -> bytes:
    """Returns preference rows in OpenAI's format, which prefer the answers of `stacks.rows` to an unrelated word."""
    chats = [json.loads(line)["messages"] for line in stacks.rows(number, start).splitlines()]
    made = (
        {
            "input": {"messages": chat[:1]},
            "preferred_output": chat[1:],
            "non_preferred_output": [{"role": "assistant", "content": "never"}],
        }
        for chat in chats
    )
    return "".join(json.dumps(row) + "\n" for row in made).encode()


@pytest.mark.slow
def test_preferences_are_learned_on_top_of_a_supervised_fine_tune(
    stack: Stack, client: OpenAI, base: str, tmp_path: Path
) -> None:
    """The second job's scorecard has preference accuracy and the general benchmark, compared with the base."""
    supervised = client.fine_tuning.jobs.create(
        model=base,
        training_file=stacks.upload(client, "train.jsonl", stacks.rows(24)),
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
        seed=1,
        extra_body={"technique": {"type": "lora", "r": 4}, "learning_rate": 0.01},
    )
    first = stacks.finish(stack, client, supervised.id)
    assert first.fine_tuned_model

    preferring = client.fine_tuning.jobs.create(
        model=first.fine_tuned_model,
        training_file=stacks.upload(client, "pairs.jsonl", _pairs(24)),
        validation_file=stacks.upload(client, "held-out.jsonl", _pairs(6, start=30)),
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 8, "beta": 0.2}}},
        seed=1,
        extra_body={
            "learning_rate": 0.01,
            "evaluation": QUICK | {"test_file": stacks.upload(client, "test.jsonl", _pairs(8, start=40))},
        },
    )
    second = stacks.finish(stack, client, preferring.id)

    assert second.fine_tuned_model not in (None, first.fine_tuned_model)
    assert second.method
    assert second.method.type == "dpo"
    assert second.method.dpo
    assert second.method.dpo.hyperparameters
    assert second.method.dpo.hyperparameters.beta == 0.2
    steps = stacks.get(client, f"/fine_tuning/jobs/{second.id}/metrics")["data"]
    assert steps[0]["train_rewards_margin"] == 0, "the reference is the model from which it continues"
    assert steps[-1]["train_rewards_margin"] > 0
    assert second.model_extra
    card = second.model_extra["scorecard"]
    assert card["metrics"]["preferred"]["tuned"] == 1
    assert card["general"]["items"] == 10
    assert {"scorecard.json", "answers.jsonl"} <= stacks.download(client, second.id, tmp_path).keys()
    ask: list[Any] = [{"role": "user", "content": "Question 1 about my cash"}]
    reply = client.chat.completions.create(model=second.fine_tuned_model or "", messages=ask, max_completion_tokens=8)
    assert reply.choices[0].message.content is not None
