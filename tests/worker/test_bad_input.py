"""Bad input gets an error that says what to change, before the job holds a device."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from workshop import Workshop, training_rows

from tunery.jobs.model import Job
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.models import registry
from worker.io import conversion, validation
from worker.supervisor.drain import Drain


def _judged(workshop: Workshop, job_id: str) -> Job:
    """Returns the job once its files have been validated."""
    assert validation.validate_next(workshop.settings, workshop.storage)
    return workshop.job(job_id)


def _error(workshop: Workshop, client: TestClient, job_id: str) -> dict[str, Any]:
    """Returns the error that the owner of a failed job reads."""
    assert _judged(workshop, job_id).state == "failed", workshop.story(job_id)
    shown = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    assert shown["status"] == "failed"
    return dict(shown["error"])


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _chat(*said: tuple[str, str], **answer: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in said]
    return {"messages": [*messages[:-1], messages[-1] | answer]}


def test_sequence_longer_than_the_context_is_cut_to_it_and_named(workshop: Workshop) -> None:
    long = _lines([_chat(("user", "What comes next?"), ("assistant", "word " * 200))])
    job_id = workshop.submit(workshop.file(training_rows(11) + long), max_seq_length=4096)

    job = _judged(workshop, job_id)

    assert job.state == "queued"
    assert (job.plan or {})["max_seq_length"] == 256
    events = "\n".join(workshop.story(job_id))
    assert "max_seq_length 4096 exceeds the model's context of 256 tokens, which is used instead." in events
    assert "1 of 12" in events or "line 12" in events


def test_prompt_that_fills_the_context_leaves_nothing_to_learn(workshop: Workshop, client: TestClient) -> None:
    rows = [_chat(("user", "word " * 200), ("assistant", "yes")) for _ in range(12)]

    error = _error(workshop, client, workshop.submit(workshop.file(_lines(rows)), max_seq_length=4096))

    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "max_seq_length" in error["message"]


@pytest.mark.parametrize(
    ("role", "row", "words"),
    [
        ("validation", _chat(("user", "What?")), "assistant"),
        ("validation", _chat(("user", "What?"), ("assistant", "That."), weight=0), "weight"),
        ("test", _chat(("user", "What?")), "assistant"),
        ("test", _chat(("user", "What?"), ("assistant", "")), "No example has an expected answer with text"),
    ],
    ids=["validation without answers", "validation without labels", "test without answers", "test without labels"],
)
def test_file_to_evaluate_on_without_labels_is_named(
    workshop: Workshop, client: TestClient, role: str, row: dict[str, Any], words: str
) -> None:
    files = {role: workshop.file(_lines([row] * 3))}

    error = _error(workshop, client, workshop.submit(workshop.file(training_rows(12)), **files))

    assert (error["code"], error["param"]) == ("invalid_training_file", f"{role}_file")
    assert words in error["message"]


def test_pair_of_equal_answers_is_named(workshop: Workshop, client: TestClient) -> None:
    pairs = [{"prompt": f"What comes after {n}?", "chosen": f"{n + 1}", "rejected": "no"} for n in range(11)]
    equal = {"prompt": "What comes after 11?", "chosen": "12", "rejected": "12"}

    submitted = workshop.submit(workshop.file(_lines([*pairs, equal])), method={"type": "dpo"})
    error = _error(workshop, client, submitted)

    assert error["code"] == "invalid_training_file"
    assert "Example 12 has two equal answers, so there is nothing to prefer." in error["message"]


def _without_template(base: Path) -> None:
    (base / "chat_template.jinja").unlink()


def _with_fewer_rows_than_tokens(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:250].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 250}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [(_without_template, "no chat template"), (_with_fewer_rows_than_tokens, "its embedding has only 250 rows")],
)
def test_base_that_cannot_be_trained_never_becomes_ready(
    workshop: Workshop, client: TestClient, tiny_base: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    with workshop.session() as session:
        _, secret = auth.create_key(session, session.get_one(Project, workshop.project_id), "admin", admin=True)
    source = tmp_path / "source"
    shutil.copytree(tiny_base, source)
    spoil(source)
    with workshop.session() as session:
        registry.register_base(session, name="mine", source=str(source))

    assert conversion.convert_next(workshop.settings, workshop.storage, Drain())

    shown = client.get("/v1/models/mine", headers={"authorization": f"Bearer {secret}"}).json()
    assert shown["status"] == "error"
    assert words in shown["status_details"]
