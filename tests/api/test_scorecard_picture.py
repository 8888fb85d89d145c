"""The scorecard in a job, with the schema of the API's document, and as a picture."""

from typing import Any
from xml.etree import ElementTree

import pytest
import rows
from cloned_databases import Database
from teams import Team

from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.keys.model import Project

OLD = {"rows": 40, "base_exact": 0.0, "tuned_exact": 0.75, "gain": 0.75, "gain_low": 0.6, "gain_high": 0.9}
F1 = {"base": 0.5, "tuned": 0.5, "gain": 0.0, "low": -0.1, "high": 0.1}
MOVED = {
    "prompts": 20, "tokens": 900, "kl": 0.5, "kl_low": 0.4, "kl_high": 0.6, "base_nll": 1, "tuned_nll": 1.2,
    "nll_change": 0.2, "nll_change_low": 0.1, "nll_change_high": 0.3,
}  # fmt: skip
GENERAL = {
    "benchmark": "default", "items": 800, "base_accuracy": 0.5, "tuned_accuracy": 0.25, "change": -0.25,
    "change_low": -0.3, "change_high": -0.2, "p": 0.01, "base_accuracy_norm": 0.5, "tuned_accuracy_norm": 0.5,
    "forgetting": MOVED,
}  # fmt: skip
NEW = {**OLD, "primary": "field_f1", "metrics": {"<exact>": {**F1, "base": 0.25}, "field_f1": F1}, "general": GENERAL}


@pytest.fixture
def job(database: Database, team: Team, base: str) -> str:
    with database.sessions.begin() as session:
        return rows.job(session, session.get_one(Project, team.id), State.SUCCEEDED).id


def _draw(database: Database, team: Team, job: str, **values: Any) -> Any:
    with database.sessions.begin() as session:
        for name, value in values.items():
            setattr(session.get_one(Job, job), name, value)
    answer = team.http.get(f"/v1/fine_tuning/jobs/{job}/scorecard.svg")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    return ElementTree.fromstring(answer.content)


def _texts(picture: Any) -> list[str]:
    return [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("stored", [OLD, NEW], ids=["of an older release", "whole"])
def test_a_job_shows_its_scorecard_by_its_schema(
    database: Database, team: Team, job: str, stored: dict[str, Any]
) -> None:
    """A field unknown to the release that measured it has its default; one unknown to this release is left out."""
    later = {"of_a_later_release": 1, "general": {**GENERAL, "of_a_later_release": 1} if "general" in stored else None}
    with database.sessions.begin() as session:
        session.get_one(Job, job).scorecard = stored | later

    shown = team.http.get(f"/v1/fine_tuning/jobs/{job}").json()["scorecard"]

    schemas = team.http.get("/openapi.json").json()["components"]["schemas"]
    assert {"$ref": "#/components/schemas/Scorecard"} in schemas["Job"]["properties"]["scorecard"]["anyOf"]
    assert list(shown) == list(schemas["Scorecard"]["properties"])
    assert {name: shown[name] for name in OLD} == OLD
    assert {name: found["tuned"] for name, found in shown["metrics"].items()} == {
        name: found["tuned"] for name, found in stored.get("metrics", {}).items()
    }
    assert shown["general"] == stored.get("general")
    assert shown["samples"] == []


def test_an_older_scorecard_is_drawn(database: Database, team: Team, job: str) -> None:
    picture = _draw(database, team, job, scorecard=OLD)
    circles = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert [float(circle.get("cx")) for circle in circles] == [250, 250 + 0.75 * 320]
    assert "+75.0 points (+60.0 to +90.0)" in _texts(picture)


def test_every_figure_is_drawn_the_tasks_own_first(database: Database, team: Team, job: str) -> None:
    gate = {"status": "failed", "withheld": True, "checks": []}
    texts = _texts(_draw(database, team, job, scorecard=NEW, gate=gate))
    names = [text for text in texts if text in ("field_f1", "<exact>", "general ability (800 questions)")]
    assert names == ["field_f1", "<exact>", "general ability (800 questions)"]
    assert "-25.0 points (-30.0 to -20.0)" in texts
    assert any("KL to the base 0.500 nats per token (0.400 to 0.600)" in text for text in texts)
    assert "Gate: failed, the model is withheld" in texts


def test_the_longest_change_ends_inside_the_picture(database: Database, team: Team, job: str) -> None:
    worst = {"tuned_exact": 0.0, "base_exact": 1.0, "gain": -1.0, "gain_low": -1.0, "gain_high": -1.0}
    picture = _draw(database, team, job, scorecard=OLD | worst)
    (change,) = [one for one in picture.iter("{http://www.w3.org/2000/svg}text") if " points (" in one.text]
    assert change.text == "-100.0 points (-100.0 to -100.0)"
    widest = 0.6 * float(picture.get("font-size")) * len(change.text)  # as in DejaVu Sans, whose letters are wide
    assert float(change.get("x")) + widest <= float(picture.get("width")) - 8


def test_a_job_without_a_scorecard_has_no_picture(team: Team, job: str) -> None:
    answer = team.http.get(f"/v1/fine_tuning/jobs/{job}/scorecard.svg")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "has no scorecard" in answer.json()["error"]["message"]
