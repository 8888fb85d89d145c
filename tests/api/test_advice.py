"""Advice over HTTP: it waits for the file's report, counts usable rows, and says what to change in a request."""

from pathlib import Path
from typing import Any

import pytest
import rows
from cloned_databases import Database
from model_server import ModelServer
from reported import finish, upload
from sqlalchemy import select
from teams import ALIAS, BASE, TRAIN, Team

from api.schemas.advice import AdviceAnswer
from tunery.datasets import reports
from tunery.datasets.model import FileReport
from tunery.jobs import leases
from tunery.jobs.model import HostDevice
from tunery.planning import advice, memory, shape
from tunery.spec import Lora

ROUTE = "/v1/fine_tuning/advice"


def test_it_waits_for_the_report_and_counts_rows_that_say_something(
    team: Team, base: str, database: Database, tmp_path: Path
) -> None:
    body = {"file": upload(team), "model": ALIAS, "aim": "style"}
    waiting = team.http.post(ROUTE, json=body).json()
    assert (waiting["status"], waiting["progress"], waiting["advice"]) == ("queued", 0.0, None)

    finish(database, tmp_path)
    answer = team.http.post(ROUTE, json=body)
    found = AdviceAnswer.model_validate(answer.json(), strict=True)
    assert (found.object, found.file, found.model, found.status) == ("fine_tuning.advice", body["file"], ALIAS, "ready")
    assert found.advice is not None
    assert found.advice.rows.model_dump() == {
        "total": 12,
        "usable": 1,
        "left_out": {"exact_duplicate": 11},
        "answer_tokens": 0,
        "refused": None,
    }
    assert found.advice.recommendation == "prompt"
    assert found.serving is not None
    assert (found.serving.device, found.serving.basis) == ("T4", "memory_bandwidth")


def test_serving_is_quoted_by_what_the_model_server_has_measured(
    asking: Team, server: ModelServer, base: str, database: Database, tmp_path: Path
) -> None:
    body = {"file": upload(asking), "model": base, "aim": "style"}
    finish(database, tmp_path)
    assert asking.http.post(ROUTE, json=body).json()["serving"]["basis"] == "memory_bandwidth"
    rate = {"base": base, "way": "adapter", "tokens": 800, "seconds": 20.0, "passes": 400}
    server.rates = {"device": "cpu", "rates": [rate, {**rate, "base": "another", "tokens": 9000}]}
    found = asking.http.post(ROUTE, json=body).json()["serving"]
    assert (found["device"], found["basis"], found["merged"]) == ("cpu", "measured", None)
    assert (found["adapter"]["tokens_per_second"]["expected"], found["adapter"]["answers"]) == (40, 2)


def test_numbers_follow_the_base_and_the_devices(team: Team, base: str, database: Database, tmp_path: Path) -> None:
    body = {"file": upload(team), "model": base, "aim": "domain_language"}
    finish(database, tmp_path, rows=2000, left_out={}, answer_bytes=4 * 10**6)
    found = team.http.post(ROUTE, json=body).json()["advice"]
    said = {one["field"]: one["value"] for one in found["suggestions"]}
    assert found["recommendation"] == "fine_tune"
    assert (said["technique.type"], said["technique.r"], said["held_out.share"]) == ("lora", 64, 0.1)
    assert said["learning_rate"] == pytest.approx(advice.default_learning_rate(64, Lora()), rel=1e-2)
    learns = shape.trainable_params(rows.MODEL_INFO, Lora(r=64))
    assert any(f"it has {learns:,} parameters at rank 64" in text for text in found["warnings"])

    few = memory.estimate(rows.MODEL_INFO, Lora(), max_seq_length=2048).bytes - 1
    with database.sessions.begin() as session:
        card = HostDevice(id="h/gpu0", host="h", gpu_index=0, device="a card", memory_bytes=few, bf16=True)
        leases.show_device(session, card)
    found = team.http.post(ROUTE, json=body).json()["advice"]
    assert found["settings"]["technique"] == {"type": "qlora", "r": 64}


def test_settings_make_a_job(team: Team, base: str, database: Database, tmp_path: Path) -> None:
    file_id = upload(team)
    finish(database, tmp_path)
    asked = {"file": file_id, "model": base, "aim": "general_accuracy"}
    settings = team.http.post(ROUTE, json=asked).json()["advice"]["settings"]
    answer = team.http.post("/v1/fine_tuning/jobs", json={"model": base, "training_file": file_id, **settings})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["technique"]["r"], answer.json()["replay"]["share"]) == (16, 0.1)


def test_a_full_fine_tune_is_warned_of_forgetting(team: Team, base: str, database: Database, tmp_path: Path) -> None:
    asked = {"file": upload(team), "model": base, "aim": "style", "technique": {"type": "full"}}
    finish(database, tmp_path)
    warnings = team.http.post(ROUTE, json=asked).json()["advice"]["warnings"]
    assert any("'lora'" in text and "replay" in text for text in warnings)


def test_rows_of_the_validation_file_do_not_count(team: Team, base: str, database: Database, tmp_path: Path) -> None:
    other = upload(team, TRAIN * 2)
    asked = {"file": upload(team), "model": base, "aim": "style", "validation_file": other}
    team.http.post(ROUTE, json=asked)
    finish(database, tmp_path)
    with database.sessions.begin() as session:
        compared = [row.against for row in session.scalars(select(FileReport)) if row.against]
    found = team.http.post(ROUTE, json=asked).json()
    assert (len(compared), found["status"], found["validation_file"]) == (1, "ready", other)
    assert "held_out.share" not in {one["field"] for one in found["advice"]["suggestions"]}


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"aim": "world_peace"}, 400, "aim"),
    ({"model": "nothing"}, 404, "model"),
    ({"file": "file-nothing"}, 404, "file"),
    ({"validation_file": "file-nothing"}, 404, "validation_file"),
    ({"technique": {"type": "full", "r": 4}}, 400, "technique.r"),
    ({"colour": "red"}, 400, "colour"),
]


def test_what_is_wrong_is_named(team: Team, base: str) -> None:
    asked = {"file": upload(team), "model": BASE, "aim": "style"}
    for changes, status, param in WRONG:
        answer = team.http.post(ROUTE, json=asked | changes)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.json()


def test_a_file_without_a_report_and_one_whose_report_failed(team: Team, base: str, database: Database) -> None:
    other = team.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("x", b"x")}).json()
    answer = team.http.post(ROUTE, json={"file": other["id"], "model": base, "aim": "style"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_report")
    file_id = upload(team)
    with database.sessions.begin() as session:
        reports.finish(session, session.scalars(select(FileReport)).one(), error="It was too large.")
    found = team.http.post(ROUTE, json={"file": file_id, "model": base, "aim": "style"}).json()
    assert (found["status"], found["error"], found["advice"]) == ("failed", "It was too large.", None)


def test_a_page_shows_the_advice_and_text_as_text(team: Team, base: str, database: Database, tmp_path: Path) -> None:
    bad = '<img src=x onerror="alert(1)">'
    file_id = upload(team, name=f"{bad}.jsonl")
    address = f"/v1/files/{file_id}/advice.html?model={base}&aim=new_facts"
    assert 'http-equiv="refresh"' in team.http.get(address).text
    finish(database, tmp_path)
    page = team.http.get(address)
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "Do not fine-tune: use retrieval (RAG)." in page.text
    assert "<img" not in page.text
    assert "&lt;img" in page.text
    assert "<script" not in page.text
    assert team.http.get(f"/v1/files/{file_id}/advice.html?model={base}&aim=peace").json()["error"]["param"] == "aim"
