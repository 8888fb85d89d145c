"""One line, added to a copy of the code, makes a training option that jobs can be created with.

tests/worker/test_additions.py runs a job with one.
"""

from pathlib import Path

import pytest
from cloned_databases import Database
from releases import Release
from teams import BASE, TRAIN, Team

from tunery.jobs.model import Job

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
plans = [advice.resolve(spec, examples=9, model_info={"hidden_size": 64}, bf16_fits=True) for spec in specs]
print(json.dumps({
    "made": made,
    "older": http.get(f"/v1/fine_tuning/jobs/{older}").json(),
    "plans": [plan.model_dump(mode="json") for plan in plans],
    "example": JOB["toy"],
    "schema": app.openapi()["components"]["schemas"]["CreateJob"]["properties"].get("toy"),
}))
"""


@pytest.fixture
def next_release(tmp_path: Path) -> Release:
    """A copy of the code with the line of one more option."""
    made = Release.copy(tmp_path / "next")
    made.change("tunery/spec.py", "class TrainingOptions(", "    packing: bool", OPTION + "    packing: bool")
    return made


@pytest.mark.slow
def test_one_line_makes_an_option(next_release: Release, team: Team, base: str, database: Database) -> None:
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN}).json()["id"]
    body = {"model": BASE, "training_file": file}
    older = team.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]

    said = next_release.ask(SCRIPT, team.key, older, {**body, "toy": 5}, body, {**body, "toy": 10})

    asked, silent, wrong = said["made"]
    assert (asked["toy"], silent["toy"], said["older"]["toy"]) == (5, 3, 3)
    assert wrong["error"]["param"] == "toy"
    assert [plan["toy"] for plan in said["plans"]] == [5, 3]
    assert (said["schema"]["description"], said["example"]) == ("A toy", 3)
    with database.sessions() as session:
        assert session.get_one(Job, asked["id"]).spec["toy"] == 5
