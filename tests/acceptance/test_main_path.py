"""A file becomes a model that answers, through the official client and without any mock."""

import base64
import hashlib
import json
from typing import Any

import openai
import pytest
import stacks
from openai import OpenAI
from stacks import Tuned

from tunery import processes
from tunery.local.stack import Stack

ASK: list[Any] = [{"role": "user", "content": "Question 99 about my cash"}]


def test_the_job_says_what_became_of_it(tuned: Tuned, base: str) -> None:
    job = tuned.job
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith(f"ft:{base}:tunery:words:")
    assert job.error is None or job.error.message is None
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert job.trained_tokens is not None
    assert job.trained_tokens > 0
    assert job.model == base
    assert job.seed == 3
    assert job.metadata == {"team": "tests"}
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == 8
    assert job.estimated_finish is None


def test_its_events_tell_the_story_in_order(tuned: Tuned, client: OpenAI) -> None:
    events = list(client.fine_tuning.jobs.list_events(tuned.job.id))[::-1]
    story = [event.message for event in events]
    landmarks = [
        f"Created fine-tuning job: {tuned.job.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 6/6: training loss=",
        "New fine-tuned model created",
        "The job has successfully completed",
    ]
    places = [next((i for i, message in enumerate(story) if message.startswith(mark)), None) for mark in landmarks]
    assert None not in places, story
    assert places == sorted(places, key=lambda place: place or 0), story
    losses = [event.data["train_loss"] for event in events if event.type == "metrics" and "train_loss" in event.data]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_its_checkpoints_are_models(tuned: Tuned, client: OpenAI) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(tuned.job.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 3]
    assert checkpoints[0].metrics.full_valid_loss is not None
    reply = client.chat.completions.create(
        model=checkpoints[1].fine_tuned_model_checkpoint, messages=ASK, temperature=0, max_tokens=4
    )
    assert reply.model == checkpoints[1].fine_tuned_model_checkpoint


def test_its_result_file_is_openais_table(tuned: Tuned, client: OpenAI) -> None:
    (result,) = tuned.job.result_files
    table = base64.b64decode(client.files.content(result).read()).decode().splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in table[1:]] == ["1", "2", "3", "4", "5", "6"]


def test_its_webhook_arrived_and_its_signature_is_right(tuned: Tuned) -> None:
    assert tuned.receiver.wait_for(stacks.SUCCEEDED, tuned.job.id, seconds=30), tuned.receiver.refused
    assert tuned.receiver.refused == []


def test_its_artifacts_arrive_as_the_list_says(tuned: Tuned) -> None:
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        tuned.listed
    )
    for path, said in tuned.listed.items():
        content = (tuned.folder / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (said["bytes"], said["sha256"]), path


def test_its_log_can_be_read(tuned: Tuned, client: OpenAI) -> None:
    text = client.get(f"/fine_tuning/jobs/{tuned.job.id}/logs", cast_to=str)
    assert "trainable params" in text


def test_its_scorecard_counts_the_test_rows(tuned: Tuned) -> None:
    assert tuned.job.model_extra
    assert tuned.job.model_extra["scorecard"]["rows"] == 6


def test_the_tuned_model_answers_otherwise_than_its_base(tuned: Tuned, client: OpenAI, base: str) -> None:
    def ask(model: str) -> str | None:
        reply = client.chat.completions.create(model=model, messages=ASK, temperature=0, max_completion_tokens=8)
        assert reply.model == model
        return reply.choices[0].message.content

    assert ask(tuned.model) != ask(base)


def test_the_answer_is_the_one_the_trainer_counted(tuned: Tuned, client: OpenAI) -> None:
    """The scorecard holds for the served model only if template and weights are the same."""
    scored = [json.loads(line) for line in (tuned.folder / "answers.jsonl").read_text().splitlines()]
    for row in scored[:3]:
        reply = client.chat.completions.create(
            model=tuned.model, messages=row["messages"], temperature=0, max_completion_tokens=8
        )
        assert reply.choices[0].message.content == row["tuned"]


def test_a_stream_through_the_api_arrives_in_pieces(tuned: Tuned, client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=tuned.model,
            messages=ASK,
            temperature=0,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    whole = client.chat.completions.create(model=tuned.model, messages=ASK, temperature=0, max_tokens=8)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_servers_refusals_reach_the_client(client: OpenAI, base: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=base, messages=ASK, presence_penalty=1)
    assert refused.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=ASK)
    assert missing.value.code == "model_not_found"


def test_a_client_that_hangs_up_stops_the_server_behind_the_api(stack: Stack, client: OpenAI, base: str) -> None:
    """The untuned base has not learned to stop: its greedy answer would have 8,000 tokens."""
    asked: dict[str, Any] = {"model": base, "messages": ASK, "temperature": 0}
    with client.chat.completions.create(**asked, stream=True) as stream:
        next(iter(stream))
        assert stacks.server_health(stack)["busy"]
    assert _falls_idle(stack), stacks.logs(stack)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(**asked)
    assert _falls_idle(stack), stacks.logs(stack)


def _falls_idle(stack: Stack) -> bool:
    """Returns whether the server becomes idle within 5 s, long before the answer would have ended by itself."""
    return processes.wait_until(lambda: not stacks.server_health(stack)["busy"], seconds=5, alive=lambda: True)
