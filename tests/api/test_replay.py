"""Replay in requests: what a job shows of it, and which file it may name."""

from typing import Any

import pytest
from teams import BASE, TRAIN, Team

DEFAULTS = {"share": 0.1, "source": "self", "max_new_tokens": 160}


@pytest.fixture
def file(team: Team) -> str:
    return upload(team)


def upload(team: Team) -> str:
    sent = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN})
    return str(sent.json()["id"])


def create(team: Team, file: str, **body: Any) -> Any:
    return team.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file, **body})


def test_replay_is_off_unless_asked_for_and_has_defaults(team: Team, file: str, base: str) -> None:
    assert create(team, file).json()["replay"] is None
    assert create(team, file, replay={}).json()["replay"] == DEFAULTS
    assert create(team, file, replay={"share": 0.03}).json()["replay"] == DEFAULTS | {"share": 0.03}


@pytest.mark.parametrize(
    ("replay", "param"),
    [
        ({"share": 0}, "replay.share"),
        ({"share": 0.6}, "replay.share"),
        ({"source": "other"}, "replay.source"),
        ({"max_new_tokens": 8}, "replay.max_new_tokens"),
    ],
)
def test_what_is_out_of_bounds_is_refused(team: Team, file: str, base: str, replay: Any, param: str) -> None:
    refused = create(team, file, replay=replay)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_preference_tuning_has_no_replay(team: Team, file: str, base: str) -> None:
    refused = create(team, file, replay={}, method={"type": "dpo"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "replay")
    assert "Leave replay out" in refused.json()["error"]["message"]


def test_a_file_of_general_rows_has_to_be_there_and_stays(team: Team, file: str, base: str) -> None:
    missing = create(team, file, replay={"source": "file-none"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "replay.source")
    general = upload(team)
    job = create(team, file, replay={"source": general}).json()
    assert job["replay"]["source"] == general
    kept = team.http.delete(f"/v1/files/{general}")
    assert (kept.status_code, kept.json()["error"]["code"]) == (400, "file_in_use")
    team.http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert team.http.delete(f"/v1/files/{general}").json()["deleted"]
    again = team.http.post(f"/v1/fine_tuning/jobs/{job['id']}/rerun", json={})
    assert (again.status_code, again.json()["error"]["param"]) == (404, "replay.source")
