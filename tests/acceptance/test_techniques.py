"""Every technique trains a model that answers as it was scored; the settings are given as textbooks give them."""

import json
from pathlib import Path
from typing import Any

import pytest
import stacks
from openai import OpenAI

from tunery.local.stack import Stack

TEXTBOOK: list[dict[str, Any]] = [
    {"type": "lora", "r": 8, "alpha": 32, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    {
        "type": "qlora",
        "r": 8,
        "alpha": 32,
        "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "quant_type": "nf4",
        "double_quant": True,
        "compute_dtype": "bfloat16",
    },
    {"type": "full"},
]


@pytest.mark.slow
@pytest.mark.parametrize("technique", TEXTBOOK, ids=lambda technique: technique["type"])
def test_a_technique_gives_a_model_that_says_what_it_learned(
    stack: Stack, client: OpenAI, base: str, tmp_path: Path, technique: dict[str, Any]
) -> None:
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=stacks.upload(client, "train.jsonl", stacks.rows(24)),
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}},
        seed=1,
        extra_body={
            "technique": technique,
            "learning_rate": 0.01,
            "evaluation": {
                "test_file": stacks.upload(client, "test.jsonl", stacks.rows(6, start=30)),
                "max_new_tokens": 8,
            },
        },
    )
    job = stacks.finish(stack, client, job.id)
    assert job.model_extra
    assert technique.items() <= job.model_extra["technique"].items()
    listed = stacks.download(client, job.id, tmp_path)
    assert ("adapter_model.safetensors" in listed) == (technique["type"] != "full")
    steps = stacks.get(client, f"/fine_tuning/jobs/{job.id}/metrics")["data"]
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]
    for row in [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()][:2]:
        reply = client.chat.completions.create(
            model=job.fine_tuned_model or "", messages=row["messages"], temperature=0, max_completion_tokens=8
        )
        # QLoRA multiplies in bf16, where a single row is rounded differently from a batch; the answers of this random
        # model depend on such digits. tests/worker/test_served_as_scored.py compares a QLoRA in fp32.
        assert technique["type"] == "qlora" or reply.choices[0].message.content == row["tuned"]
