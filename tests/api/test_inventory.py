"""Jobs that may not fit on the available devices: refused, left to the memory probe, or forced."""

from typing import Any

import pytest
from cloned_databases import Database
from reported import upload
from sqlalchemy import select
from teams import Team

from tunery.jobs import leases
from tunery.jobs.model import HostDevice, Job
from tunery.models.model import Model
from tunery.planning import expected, memory
from tunery.spec import Full, Qlora

ROUTE = "/v1/fine_tuning/jobs"


def show(database: Database, size: int) -> None:
    """Registers a card with `size` bytes of memory."""
    card = HostDevice(id="h/gpu0", host="h", gpu_index=0, device="a card", memory_bytes=size, bf16=True)
    with database.sessions.begin() as session:
        leases.show_device(session, card)


def model_info_of(database: Database, base: str) -> dict[str, Any]:
    with database.sessions.begin() as session:
        return dict(session.get_one(Model, base).model_info)


def create(team: Team, base: str, file_id: str, **fields: Any) -> Any:
    body = {"model": base, "training_file": file_id, "technique": {"type": "full"}, **fields}
    return team.http.post(ROUTE, json=body)


def test_what_no_device_holds_at_the_least_is_refused_with_what_to_change(
    team: Team, base: str, database: Database
) -> None:
    file_id, model_info = upload(team), model_info_of(database, base)
    least = memory.estimate(model_info, Full(), max_seq_length=64).bytes
    show(database, least - 1)

    refused = create(team, base, file_id)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("does_not_fit", "technique")
    assert "Set resources.force to true" in error["message"]
    assert "Use the technique 'qlora'" in error["message"] or "a smaller base model" in error["message"]
    with database.sessions.begin() as session:
        assert session.scalars(select(Job)).all() == []

    tried = create(team, base, file_id, dry_run=True).json()
    assert (tried["status"], tried["error"]["code"]) == ("failed", "does_not_fit")


def test_a_job_on_the_border_is_left_to_the_probe(team: Team, base: str, database: Database) -> None:
    """The trainer would find no plan for rows of max_seq_length tokens, but the actual rows may be short."""
    file_id, model_info = upload(team), model_info_of(database, base)
    least = memory.estimate(model_info, Full(), max_seq_length=64).bytes
    show(database, least)

    assert not expected.runs(model_info, Full(), max_seq_length=2048, capacity=least)
    tried = create(team, base, file_id, dry_run=True).json()
    assert (tried["error"], tried["expected"]) == (None, None)
    assert any("Rows of 2048 tokens may not fit on the largest GPU here" in text for text in tried["warnings"])
    taken = create(team, base, file_id)
    assert (taken.status_code, taken.json()["status"]) == (200, "validating_files")


@pytest.mark.parametrize("fields", [{"technique": {"type": "full"}}, {"technique": {"type": "qlora"}}])
def test_force_skips_the_refusal(team: Team, base: str, database: Database, fields: dict[str, Any]) -> None:
    file_id, model_info = upload(team), model_info_of(database, base)
    show(database, min(memory.estimate(model_info, one, max_seq_length=64).bytes for one in (Full(), Qlora())) // 2)

    assert create(team, base, file_id, **fields).status_code == 400
    forced = create(team, base, file_id, **fields, resources={"force": True})
    assert forced.status_code == 200
    assert forced.json()["resources"]["force"] is True


def test_without_any_device_nothing_is_refused(team: Team, base: str, database: Database) -> None:
    assert create(team, base, upload(team)).status_code == 200
