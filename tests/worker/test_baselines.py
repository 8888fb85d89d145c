"""Baselines from the request to the table, measured by the real worker's code on a tiny model."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asgi
import pytest
import served
import tiny_models
from fastapi.testclient import TestClient
from openai import OpenAI
from pydantic import SecretStr
from receiver import LOOPBACK
from run_folders import chat, lay_out, plan
from workshop import Workshop

from api.main import create_app
from api.schemas.baselines import Baseline
from tunery.artifacts import manifest
from tunery.baselines.model import Baseline as Stored
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.models import imports
from tunery.models.model import Model
from tunery.spec import Evaluation, General, Lora, named_columns
from worker.io import baselines, programs
from worker.server.backends.embedded import Engine
from worker.supervisor.drain import Drain
from worker.trainer import run
from worker.trainer.report import MessageWriter
from worker.trainer.stop_signal import StopSignal

ROUTE = "/v1/fine_tuning/baselines"
EVAL, KNOWN = [chat(i) for i in range(100, 106)], [chat(i) for i in range(12)]

ALLOWED = {"external_secret": SecretStr("sixteen characters and more"), "external_allow": LOOPBACK}


@pytest.fixture
def service(workshop: Workshop) -> Iterator[str]:
    """Yields the URL of the API, with the model server behind it, for an OpenAI client."""
    with served.serving(Engine(workshop.settings.models_dir, workshop.storage)) as port:
        settings = workshop.database.settings.model_copy(update={"server_url": f"http://127.0.0.1:{port}"})
        with asgi.serving(create_app(settings)) as url:
            yield f"{url}/v1"


def lines(found: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def ask(client: TestClient, workshop: Workshop, **more: Any) -> Baseline:
    """Requests a baseline and measures it as the worker does; returns it as the API shows it then."""
    changed = workshop.settings.model_copy(update=ALLOWED)
    body = {"model": workshop.base_id, "eval_file": workshop.file(lines(EVAL)), "max_new_tokens": 4, **more}
    made = client.post(ROUTE, json=body)
    assert made.status_code == 200, made.text
    assert baselines.measure_next(changed, workshop.storage, Drain())
    return Baseline.model_validate(client.get(f"{ROUTE}/{made.json()['id']}").json(), strict=True)


@pytest.mark.slow
def test_zero_shot_is_the_base_score_of_a_job(
    client: TestClient, workshop: Workshop, tiny_base: Path, tmp_path: Path
) -> None:
    found = ask(client, workshop, examples_file=workshop.file(lines(KNOWN)), shots=[0, 2], retrieval="nearest")
    assert (found.status, found.error, found.progress) == ("succeeded", None, 1.0)
    assert [(row.way, row.shots, row.rows) for row in found.table] == [
        ("zero_shot", 0, 6),
        ("few_shot", 2, 6),
        ("nearest", 2, 6),
    ]

    asked = plan(evaluation=Evaluation(test_file="file-1", max_new_tokens=4, general=General(items=4, prompts=2)))
    trained = lay_out(tmp_path / "trained", tiny_base, asked, KNOWN, test=EVAL)
    assert run.carry_out(trained, MessageWriter(None), StopSignal())
    card = json.loads((trained / "out" / "scorecard.json").read_text())
    zero = found.table[0]
    assert zero.metric == card["primary"]
    assert {name: one.score for name, one in zero.metrics.items()} == {
        name: one["base"] for name, one in card["metrics"].items()
    }
    by_job = [json.loads(line)["base"] for line in (trained / "out" / "answers.jsonl").read_text().splitlines()]
    kept = client.get(f"{ROUTE}/{found.id}/answers").text.splitlines()
    assert [json.loads(line)["answer"] for line in kept[:6]] == by_job


@pytest.mark.slow
def test_an_external_endpoint_stands_in_the_same_table(
    workshop: Workshop, service: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The endpoint is this service: the same model has to give the same answers."""
    with workshop.session() as session:
        _, secret = auth.create_key(session, session.get_one(Project, workshop.project_id), "test")
    headers = {"authorization": f"Bearer {secret}"}
    on = TestClient(create_app(workshop.database.settings.model_copy(update=ALLOWED)), headers=headers)
    price = {"prompt": 2.0, "answer": 8.0}
    external = {"base_url": service, "model": "tiny", "api_key": secret, "price_per_million": price}
    found = ask(on, workshop, shots=[0], external=external)
    assert found.status == "succeeded", found.error
    here, there = found.table
    assert (there.place, there.model, there.error) == ("external", "tiny", None)
    assert (there.metrics, there.prompt_tokens) == (here.metrics, here.prompt_tokens)
    assert there.prompt_tokens is not None
    assert there.answer_tokens is not None
    assert there.cost_per_1000 == pytest.approx((2 * there.prompt_tokens + 8 * there.answer_tokens) / 1000)
    assert secret not in caplog.text
    with workshop.session() as session:
        assert session.get_one(Stored, found.id).external_key is None

    refused = ask(on, workshop, shots=[0], external={**external, "api_key": "wrong"})
    assert refused.status == "succeeded"
    assert "check external.api_key" in (refused.table[1].error or "")


@pytest.mark.slow
def test_the_numbers_are_those_of_chat_completions(client: TestClient, workshop: Workshop, service: str) -> None:
    """The test sends every prompt of the table with the official client and scores the answers itself."""
    found = ask(client, workshop, examples_file=workshop.file(lines(KNOWN)), shots=[0, 2], retrieval="nearest")
    asked = [json.loads(line) for line in client.get(f"{ROUTE}/{found.id}/answers").text.splitlines()]
    openai = OpenAI(base_url=service, api_key=client.headers["authorization"].removeprefix("Bearer "))
    correct: Counter[tuple[int, bool]] = Counter()
    tokens: Counter[tuple[int, bool]] = Counter()
    for one in asked:
        made = openai.chat.completions.create(model="tiny", messages=one["messages"], temperature=0, max_tokens=4)
        way = one["shots"], one["nearest"]
        correct[way] += (made.choices[0].message.content or "").strip() == one["wanted"]
        tokens[way] += made.usage.prompt_tokens if made.usage else 0
    for row in found.table:
        way = row.shots, row.way == "nearest"
        assert row.metrics["exact"].score == correct[way] / row.rows
        assert row.prompt_tokens == pytest.approx(tokens[way] / row.rows)


def test_a_worker_lets_go_of_a_baseline_that_is_cancelled(
    client: TestClient, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client.post(ROUTE, json={"model": workshop.base_id, "eval_file": workshop.file(lines(EVAL))}).json()
    monkeypatch.setattr(baselines.progress, "read", lambda _: client.post(f"{ROUTE}/{made['id']}/cancel") and 0.5)
    assert baselines.measure_next(workshop.settings, workshop.storage, Drain())
    found = client.get(f"{ROUTE}/{made['id']}").json()
    assert (found["status"], found["table"]) == ("cancelled", [])
    assert list(workshop.storage.list("baselines/")) == []
    assert not baselines.measure_next(workshop.settings, workshop.storage, Drain())


def test_a_file_that_cannot_be_asked_fails_with_the_reason(client: TestClient, workshop: Workshop) -> None:
    found = ask(client, workshop, eval_file=workshop.file(b'{"messages": [{"role": "user", "content": "q"}]}\n'))
    assert (found.status, "assistant" in (found.error or "")) == ("failed", True)


@pytest.mark.slow
def test_a_table_is_read_by_named_columns(client: TestClient, workshop: Workshop) -> None:
    """The answers are those to the same rows as chats."""
    said = [[message["content"] for message in row["messages"]] for row in EVAL]
    assert {len(texts) for texts in said} == {2}
    table = lines([dict(zip(("Frage", "Antwort"), texts, strict=True)) for texts in said])
    named = {"prompt": "Frage", "completion": "Antwort"}
    chats = ask(client, workshop, shots=[0])
    found = ask(client, workshop, shots=[0], eval_file=workshop.file(table), columns=named)
    assert (found.status, found.error, named_columns(found.columns)) == ("succeeded", None, named)
    kept = [client.get(f"{ROUTE}/{one.id}/answers").text for one in (chats, found)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("gpu", "visible"), [(None, ""), (1, "1")])
def test_answers_are_computed_on_the_gpu_that_is_reserved(
    client: TestClient, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, gpu: int | None, visible: str
) -> None:
    plain, seen = programs.run, []

    def run(arguments: list[str], *args: Any, **more: Any) -> str | None:
        if arguments[0] != "worker.trainer.prompting":
            return plain(arguments, *args, **more)
        seen.append(more["variables"]["CUDA_VISIBLE_DEVICES"])
        return "No further."

    monkeypatch.setattr(programs, "run", run)
    made = client.post(ROUTE, json={"model": workshop.base_id, "eval_file": workshop.file(lines(EVAL))})
    assert made.status_code == 200, made.text
    changed = workshop.settings.model_copy(update={"io_gpu": gpu})
    assert baselines.measure_next(changed, workshop.storage, Drain())
    assert seen == [visible]


def test_a_worker_that_stops_gives_its_try_back(
    client: TestClient, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client.post(ROUTE, json={"model": workshop.base_id, "eval_file": workshop.file(lines(EVAL))}).json()
    drain = Drain()
    monkeypatch.setattr(baselines.progress, "read", lambda _: drain.begin())
    assert baselines.measure_next(workshop.settings, workshop.storage, drain)
    with workshop.session() as session:
        row = session.get_one(Stored, made["id"])
        assert (row.status, row.tries) == ("queued", 0)


@pytest.mark.slow
def test_a_tuned_model_is_compared_with_the_prompts(
    client: TestClient, workshop: Workshop, tiny_base: Path, tmp_path: Path
) -> None:
    listed, sha256 = manifest.publish(workshop.storage, "models/lora", tiny_models.lora(tmp_path / "lora", tiny_base))
    with workshop.session() as session:
        tuned = Model(id="ft:tiny:x::1", kind="tuned", project_id=workshop.project_id, base_id=workshop.base_id)
        tuned.technique, tuned.status, tuned.prefix = "lora", "ready", "models/lora"
        tuned.manifest, tuned.manifest_sha256 = listed.model_dump(mode="json"), sha256
        tuned.model_info = {imports.TECHNIQUE: Lora(r=4, alpha=8).model_dump(mode="json")}
        session.add(tuned)
    known = workshop.file(lines(KNOWN))
    found = ask(client, workshop, examples_file=known, shots=[0, 2], compare=["ft:tiny:x::1", workshop.base_id])
    assert found.status == "succeeded", found.error
    assert [(row.way, row.model, row.shots) for row in found.table] == [
        ("zero_shot", "tiny", 0),
        ("few_shot", "tiny", 2),
        ("tuned", "ft:tiny:x::1", 0),
    ]
    kept = [json.loads(line) for line in client.get(f"{ROUTE}/{found.id}/answers").text.splitlines()]
    said = {model: [one["answer"] for one in kept if one["model"] == model and not one["shots"]] for model in
            ("tiny", "ft:tiny:x::1")}  # fmt: skip
    assert said["tiny"] != said["ft:tiny:x::1"]
