"""Dry runs of jobs: their numbers, memory and errors; they add no row to any table."""

from pathlib import Path
from typing import Any

import pytest
from cloned_databases import Database
from reported import finish, upload
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from teams import ALIAS, LINE, TRAIN, Team

from api.schemas.dry_runs import DryRunJob
from tunery.db import Base
from tunery.jobs import leases
from tunery.jobs.model import HostDevice
from tunery.planning import advice, memory
from tunery.spec import Full, Lora

ROUTE = "/v1/fine_tuning/jobs"


def count(session: Session) -> dict[str, int]:
    return {
        name: session.scalar(select(func.count()).select_from(table)) or 0
        for name, table in Base.metadata.tables.items()
    }


def test_nothing_is_stored_and_every_auto_is_a_number(
    team: Team, base: str, database: Database, tmp_path: Path
) -> None:
    file_id = upload(team)
    finish(database, tmp_path)
    client = team.openai(strict=True)
    with database.sessions.begin() as session:
        before = count(session)
    job = client.fine_tuning.jobs.create(model=ALIAS, training_file=file_id, extra_body={"dry_run": True})
    again = {"idempotency-key": "k"}
    team.http.post(ROUTE, json={"model": base, "training_file": file_id, "dry_run": True}, headers=again)
    with database.sessions.begin() as session:
        assert count(session) == before
    assert before["jobs"] == 0
    assert before["files"] == 1

    found = DryRunJob.model_validate(job.to_dict(), strict=False)
    assert (found.dry_run, found.status, found.model, found.waits_for) == (True, "validating_files", ALIAS, None)
    knobs = found.hyperparameters
    assert (knobs.n_epochs, knobs.batch_size, knobs.learning_rate_multiplier) == (8, 8, 1.0)  # 100 // 12 epochs
    assert (found.technique, found.learning_rate) == (Lora(), advice.default_learning_rate(64, Lora()))
    assert (found.validation.examples, found.validation.usable, found.validation.trainable) == (12, 1, True)
    model_info = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model_info |= {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "params": 150_000}
    assert found.memory["cuda"].bytes == memory.estimate(model_info, Lora(), max_seq_length=2048).bytes
    assert found.quote is not None
    assert (found.quote.device, found.quote.speed_from, found.quote.tokens_from) == ("T4", "estimated", "bytes")
    assert found.quote.cost is not None
    assert found.quote.seconds.low < found.quote.seconds.expected < found.quote.seconds.high
    assert found.expected is None  # no worker has registered a GPU
    assert {card.verdict for card in found.cards} == {"fits"}
    assert found.preview == f"/v1/files/{file_id}/preview?model={ALIAS}&max_tokens=2048"
    assert any("12 examples are few" in text for text in found.warnings)
    assert any("No training worker has connected yet" in text for text in found.warnings)
    assert team.http.get(f"{ROUTE}/{found.id}").status_code == 404

    kept = client.fine_tuning.jobs.create(model=ALIAS, training_file=file_id, extra_headers=again)
    assert "dry_run" not in kept.to_dict()
    assert kept.to_dict()["quote"] == found.quote.model_dump(mode="json")
    assert client.fine_tuning.jobs.retrieve(kept.id).id == kept.id
    tried = team.http.post(f"{ROUTE}/{kept.id}/rerun", json={"dry_run": True, "seed": 3}).json()
    assert (tried["dry_run"], tried["seed"], tried["rerun_of"]) == (True, 3, kept.id)


def test_what_would_fail_says_so(team: Team, base: str, database: Database, tmp_path: Path) -> None:
    file_id = upload(team)

    def tried(**fields: Any) -> dict[str, Any]:
        body = {"model": base, "training_file": file_id, "dry_run": True, **fields}
        answer: dict[str, Any] = team.http.post(ROUTE, json=body).json()
        return answer

    waiting = tried()
    assert waiting["validation"]["status"] == "queued"
    assert waiting["hyperparameters"]["n_epochs"] == "auto"
    assert waiting["memory"]["cuda"]["bytes"] > 0

    few = LINE.encode() * 9
    finish(database, tmp_path, few)
    short = tried()
    assert (short["status"], short["error"]["code"]) == ("failed", "invalid_n_examples")

    with database.sessions.begin() as session:
        card = HostDevice(id="h/gpu0", host="h", gpu_index=0, device="a card", memory_bytes=10**6, bf16=True)
        leases.show_device(session, card)
    large = tried(technique=Full().model_dump())
    assert (large["status"], large["memory"], large["expected"]) == ("failed", {}, None)
    assert large["cards"][0]["verdict"] == "fits"  # a known card would hold it
    assert "GPU" in large["error"]["message"]
    with database.sessions.begin() as session:
        card = HostDevice(id="h/gpu0", host="h", gpu_index=0, device="a card", memory_bytes=8 * 2**30, bf16=True)
        leases.show_device(session, card)
    plan = tried(technique=Full().model_dump())["expected"]
    assert (plan["tokens"], plan["recompute"]) == (8 * 2048, False)
    assert plan["allocated"] < plan["bytes"] <= 8 * 2**30
    assert tried(technique={"type": "full", "r": 4})["error"]["param"] == "technique.r"


PAIRS = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 12


@pytest.mark.parametrize(
    ("rows", "method", "said"),
    [
        (TRAIN, "dpo", "this is not a preference row"),
        (PAIRS, "supervised", "this is a preference row"),
        (b'{"a": "b"}\n' * 12, "supervised", "the key 'messages' is missing"),
        (PAIRS, "dpo", None),
    ],
)
def test_rows_of_another_method_fail_as_in_the_job(
    team: Team, base: str, database: Database, tmp_path: Path, rows: bytes, method: str, said: str | None
) -> None:
    file_id = upload(team, rows)
    finish(database, tmp_path, rows)
    body = {"model": base, "training_file": file_id, "dry_run": True, "method": {"type": method}}
    tried = team.http.post(ROUTE, json=body).json()
    if said is None:
        assert (tried["status"], tried["error"]) == ("validating_files", None)
    else:
        assert (tried["status"], tried["error"]["code"]) == ("failed", "invalid_training_file")
        assert said in tried["error"]["message"]
