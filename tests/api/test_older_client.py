"""The last client before 3.0, against a real socket: much running code still has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import rows
from databases import Database
from teams import Team

from tunery.jobs.states import State
from tunery.keys.model import Project

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / ".vendor/openai-2"


def test_every_listed_call(live: str, team: Team, base: str, database: Database) -> None:
    assert CLIENT.is_dir(), "openai 2 is missing: run `make setup`"
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        queued = rows.job(session, owner, State.QUEUED).id
        done = rows.job(session, owner, State.SUCCEEDED).id
    driven = subprocess.run(
        [sys.executable, str(ROOT / "tests/fixtures/older_client.py"), live, team.key, base, queued, done],
        env={**os.environ, "PYTHONPATH": str(CLIENT), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert driven.returncode == 0, driven.stderr[-3000:]
    assert json.loads(driven.stdout)["version"].startswith("2.")
