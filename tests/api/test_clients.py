"""The newest official client and the last one before 3.0, which much code still uses, against a real socket."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import rows
from client_calls import Drive
from cloned_databases import Database
from fastapi import FastAPI
from model_server import ModelServer
from receiver import LOOPBACK, Receiver
from sqlalchemy.orm import Session
from teams import Team

from tunery.jobs.model import Checkpoint
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.webhooks import messages, signing

ROOT = Path(__file__).parents[2]
OLDER = ROOT / ".vendor/openai-2"


def _prepare(session: Session, owner: Project, model: str) -> dict[str, str]:
    """Makes a job to pause, and one with a model and two checkpoints; returns their ids."""
    done = rows.job(session, owner, State.SUCCEEDED, base_model=model)
    for step in (1, 2):
        session.add(
            Checkpoint(
                id=f"ftckpt_{done.id}{step}", job_id=done.id, step=step, model_id=done.tuned_model, metrics={"loss": 1}
            )
        )
    return {"queued": rows.job(session, owner, State.QUEUED).id, "done": done.id}


def _event() -> dict[str, Any]:
    secret, now = signing.new_secret(), datetime.now(UTC)
    body = messages.encode("evt_1", "fine_tuning.job.succeeded", now, "ftjob-1")
    headers = signing.headers((secret,), "wh_1", int(now.timestamp()), body)
    return {"body": body.decode(), "headers": headers, "secret": secret}


@pytest.mark.parametrize(
    ("version", "path"),
    [pytest.param("3.", None, id="newest"), pytest.param("2.", OLDER, id="2.x", marks=pytest.mark.slow)],
)
def test_every_listed_call(
    version: str,
    path: Path | None,
    make_app: Callable[..., FastAPI],
    serve: Callable[[Any], str],
    receiver: Receiver,
    team: Team,
    base: str,
    database: Database,
) -> None:
    assert path is None or path.is_dir(), "openai 2 is missing: run `make setup`"
    app = make_app(webhook_allow=LOOPBACK, server_url=serve(ModelServer().app))
    app.state.storage.put("files/results", b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n")
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        results = rows.file(session, owner, purpose="fine-tune-results", key="files/results").id
        prepared = [_prepare(session, owner, base) for _ in range(2)]
    drive = Drive(serve(app), team.key, base, results, f"{receiver.url}/hook", _event())
    driven = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/fixtures/client_calls.py"),
            json.dumps({"drive": asdict(drive), "prepared": prepared}),
        ],
        env={**os.environ, "PYTHONPATH": str(path or ""), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert driven.returncode == 0, driven.stderr[-3000:]
    assert json.loads(driven.stdout)["version"].startswith(version)
    assert len(receiver.on("/hook")) == (2 if path is None else 0)
