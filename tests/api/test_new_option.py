"""One line in a copy of the code, as a developer adds it, makes a training option that jobs can be created with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from databases import Database
from teams import BASE, TRAIN, Team

from tunery.jobs.model import Job

ROOT = Path(__file__).parents[2]
CLASS = "class TrainingOptions("
OPTION = '    toy: Int = Field(3, ge=1, le=9, description="A toy")\n'
SCRIPT = """
import json, sys
from fastapi.testclient import TestClient
from api.main import create_app
from api.schemas.jobs import JOB
from tunery.jobs.model import Job
from tunery.planning import advice
from tunery.spec import TrainingSpec

key, older, *bodies = json.loads(sys.argv[1])
app = create_app()
http = TestClient(app, headers={"authorization": f"Bearer {key}"})
made = [http.post("/v1/fine_tuning/jobs", json=body).json() for body in bodies]
with app.state.sessions() as session:
    specs = [TrainingSpec.model_validate(session.get_one(Job, id).spec) for id in (made[0]["id"], older)]
plans = [advice.resolve(spec, examples=9, facts={"hidden_size": 64}, bf16_fits=True) for spec in specs]
print(json.dumps({
    "made": made,
    "older": http.get(f"/v1/fine_tuning/jobs/{older}").json(),
    "plans": [plan.model_dump(mode="json") for plan in plans],
    "example": JOB["toy"],
    "schema": app.openapi()["components"]["schemas"]["CreateJob"]["properties"].get("toy"),
}))
"""


@pytest.fixture
def next_release(tmp_path: Path) -> Path:
    """A copy of the API and the floor with one line more."""
    for room in ("api", "tunery"):
        shutil.copytree(ROOT / room, tmp_path / "next" / room, ignore=shutil.ignore_patterns("__pycache__"))
    spec = tmp_path / "next/tunery/spec.py"
    before, name, after = spec.read_text().partition(CLASS)
    head, field, rest = after.partition("    packing: bool")
    spec.write_text(before + name + head + OPTION + field + rest)
    return tmp_path / "next"


def _ask(release: Path, *arguments: Any) -> Any:
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments)]
    found = subprocess.run(command, cwd=release, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_one_line_makes_an_option(next_release: Path, team: Team, base: str, database: Database) -> None:
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN}).json()["id"]
    body = {"model": BASE, "training_file": file}
    older = team.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]

    said = _ask(next_release, team.key, older, {**body, "toy": 5}, body, {**body, "toy": 10})

    asked, silent, wrong = said["made"]
    assert (asked["toy"], silent["toy"], said["older"]["toy"]) == (5, 3, 3)
    assert wrong["error"]["param"] == "toy"
    assert [plan["toy"] for plan in said["plans"]] == [5, 3]
    assert (said["schema"]["description"], said["example"]) == ("A toy", 3)
    with database.sessions() as session:
        assert session.get_one(Job, asked["id"]).spec["toy"] == 5
