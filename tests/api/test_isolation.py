"""One project's key against another's objects: 404 on every route, and a new route without a case here fails."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import rows
from cloned_databases import Database
from fastapi import FastAPI
from sqlalchemy import func
from teams import Team

from api.main import create_app
from tunery.artifacts.model import Artifact
from tunery.baselines.model import Baseline
from tunery.baselines.order import Order
from tunery.jobs.model import Checkpoint, Job, JobEvent
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.traffic.model import CapturedRequest
from tunery.webhooks import endpoints
from tunery.webhooks.model import Delivery

PART: dict[str, Any] = {"files": {"data": ("upload", b"x")}}
CHAT = {"messages": [{"role": "user", "content": "q"}]}

# Operation -> requests, each naming one object of the other project: (path, options). `{name}` is filled in.
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "create_file": [],
    "list_files": [("/v1/files?after={file}", {})],
    "retrieve_file": [("/v1/files/{file}", {})],
    "delete_file": [("/v1/files/{file}", {})],
    "download_file": [("/v1/files/{file}/content", {})],
    "preview_file": [("/v1/files/{file}/preview?model={base}", {}), ("/v1/files/{file}/preview?model={tuned}", {})],
    "retrieve_report": [
        ("/v1/files/{file}/report", {}),
        ("/v1/files/{own}/report?against={file}", {}),
        ("/v1/files/{own}/report?base={tuned}", {}),
    ],
    "show_report": [("/v1/files/{file}/report.html", {}), ("/v1/files/{own}/report.html?against={file}", {})],
    "show_advice": [
        ("/v1/files/{file}/advice.html?model={base}&aim=style", {}),
        ("/v1/files/{own}/advice.html?model={tuned}&aim=style", {}),
        ("/v1/files/{own}/advice.html?model={base}&aim=style&validation_file={file}", {}),
    ],
    "give_advice": [
        ("/v1/fine_tuning/advice", {"json": {"file": "{file}", "model": "{base}", "aim": "style"}}),
        ("/v1/fine_tuning/advice", {"json": {"file": "{own}", "model": "{tuned}", "aim": "style"}}),
    ],
    "create_baseline": [
        ("/v1/fine_tuning/baselines", {"json": {"model": "{base}", "eval_file": "{file}"}}),
        ("/v1/fine_tuning/baselines", {"json": {"model": "{tuned}", "eval_file": "{own}"}}),
        ("/v1/fine_tuning/baselines", {"json": {"model": "{base}", "eval_file": "{own}", "examples_file": "{file}"}}),
        ("/v1/fine_tuning/baselines", {"json": {"model": "{base}", "eval_file": "{own}", "compare": ["{tuned}"]}}),
    ],
    "list_baselines": [("/v1/fine_tuning/baselines?after={baseline}", {})],
    "retrieve_baseline": [("/v1/fine_tuning/baselines/{baseline}", {})],
    "cancel_baseline": [("/v1/fine_tuning/baselines/{baseline}/cancel", {})],
    "download_answers": [("/v1/fine_tuning/baselines/{baseline}/answers", {})],
    "clean_file": [
        ("/v1/files/{file}/clean", {"json": {"recommended": True}}),
        ("/v1/files/{own}/clean", {"json": {"recommended": True, "against": "{file}"}}),
    ],
    "retrieve_cleaning": [("/v1/files/{file}/cleaning", {})],
    "create_upload": [],
    "create_part": [("/v1/uploads/{upload}/parts", PART)],
    "complete_upload": [("/v1/uploads/{upload}/complete", {"json": {"part_ids": ["{part}"]}})],
    "cancel_upload": [("/v1/uploads/{upload}/cancel", {})],
    "create_job": [
        ("/v1/fine_tuning/jobs", {"json": {"model": "{base}", "training_file": "{file}"}}),
        ("/v1/fine_tuning/jobs", {"json": {"model": "{base}", "training_file": "{file}", "dry_run": True}}),
        ("/v1/fine_tuning/jobs", {"json": {"model": "{tuned}", "training_file": "{own}"}}),
        ("/v1/fine_tuning/jobs", {"json": {"model": "{base}", "training_file": "{own}", "validation_file": "{file}"}}),
        (
            "/v1/fine_tuning/jobs",
            {"json": {"model": "{base}", "training_file": "{own}", "evaluation": {"test_file": "{file}"}}},
        ),
    ],
    "list_jobs": [("/v1/fine_tuning/jobs?after={job}", {})],
    "retrieve_job": [("/v1/fine_tuning/jobs/{job}", {})],
    "cancel_job": [("/v1/fine_tuning/jobs/{job}/cancel", {})],
    "pause_job": [("/v1/fine_tuning/jobs/{job}/pause", {})],
    "resume_job": [("/v1/fine_tuning/jobs/{job}/resume", {})],
    "publish_model": [("/v1/fine_tuning/jobs/{job}/publish", {"json": {"reason": "mine"}})],
    "list_events": [
        ("/v1/fine_tuning/jobs/{job}/events", {}),
        ("/v1/fine_tuning/jobs/{own_job}/events?after={event}", {}),
    ],
    "list_checkpoints": [
        ("/v1/fine_tuning/jobs/{job}/checkpoints", {}),
        ("/v1/fine_tuning/jobs/{own_job}/checkpoints?after={checkpoint}", {}),
    ],
    "read_log": [("/v1/fine_tuning/jobs/{job}/logs", {}), ("/v1/fine_tuning/jobs/{job}/logs?follow=true", {})],
    "compare_job": [("/v1/fine_tuning/jobs/{job}/reproduction", {})],
    "rerun_job": [("/v1/fine_tuning/jobs/{job}/rerun", {})],
    "list_metrics": [("/v1/fine_tuning/jobs/{job}/metrics", {})],
    "draw_scorecard": [("/v1/fine_tuning/jobs/{job}/scorecard.svg", {})],
    "list_scorecard_rows": [("/v1/fine_tuning/jobs/{job}/scorecard/rows", {})],
    "list_artifacts": [("/v1/fine_tuning/jobs/{job}/artifacts", {})],
    "download_artifact": [("/v1/fine_tuning/jobs/{job}/artifacts/adapter.safetensors", {})],
    "list_models": [],
    "retrieve_model": [("/v1/models/{tuned}", {})],
    "list_model_artifacts": [("/v1/models/{tuned}/artifacts", {})],
    "download_model_artifact": [("/v1/models/{tuned}/artifacts/adapter.safetensors", {})],
    "list_engines": [("/v1/models/{tuned}/engines", {})],
    "export_model": [("/v1/models/{tuned}/exports", {"json": {"gguf": ["f16"]}})],
    "list_exports": [("/v1/models/{tuned}/exports", {})],
    "score_model": [
        ("/v1/models/{tuned}/scorecards", {"json": {"evaluation": {"test_file": "{own}"}}}),
        ("/v1/models/{own_tuned}/scorecards", {"json": {"evaluation": {"test_file": "{file}"}}}),
    ],
    "list_scorecards": [("/v1/models/{tuned}/scorecards", {})],
    "delete_model": [("/v1/models/{tuned}", {})],
    "add_model": [],
    "import_adapter": [
        ("/v1/models/adapters", {"data": {"base": "none-of-theirs"}, "files": {"file": ("a.zip", b"x")}}),
    ],
    "add_alias": [],
    "create_chat_completion": [("/v1/chat/completions", {"json": {"model": "{tuned}", **CHAT}})],
    "start_capture": [("/v1/models/{tuned}/capture", {"json": {}})],
    "retrieve_capture": [("/v1/models/{tuned}/capture", {})],
    "list_captured_requests": [
        ("/v1/models/{tuned}/capture/requests", {}),
        ("/v1/models/{own_tuned}/capture/requests?after={captured}", {}),
    ],
    "stop_capture": [("/v1/models/{tuned}/capture", {})],
    "make_file": [("/v1/models/{tuned}/capture/files", {"json": {}})],
    "retrieve_file_capture": [("/v1/files/{file}/capture", {})],
    "give_feedback": [("/v1/feedback", {"json": {"id": "{captured}", "rating": "good"}})],
    "compare_models": [("/v1/models/compare", {"json": {"models": ["{base}", "{tuned}"], "prompts": ["q"]}})],
    "create_completion": [("/v1/completions", {"json": {"model": "{tuned}", "prompt": "q"}})],
    "list_completions_usage": [],
    "create_response": [("/v1/responses", {"json": {"model": "{tuned}", "input": "q"}})],
    "create_webhook_endpoint": [],
    "list_webhook_endpoints": [("/v1/webhook_endpoints?after={endpoint}", {})],
    "retrieve_webhook_endpoint": [("/v1/webhook_endpoints/{endpoint}", {})],
    "update_webhook_endpoint": [("/v1/webhook_endpoints/{endpoint}", {"json": {"name": "mine"}})],
    "list_webhook_deliveries": [
        ("/v1/webhook_endpoints/{endpoint}/deliveries", {}),
        ("/v1/webhook_endpoints/{own_endpoint}/deliveries?after={delivery}", {}),
    ],
    "delete_webhook_endpoint": [("/v1/webhook_endpoints/{endpoint}", {})],
    "rotate_webhook_secret": [("/v1/webhook_endpoints/{endpoint}/rotate_secret", {})],
    "test_webhook_endpoint": [
        ("/v1/webhook_endpoints/{endpoint}/test", {"json": {"event_type": "fine_tuning.job.failed"}})
    ],
    "list_webhook_event_types": [],
    "healthz": [],
    "read_metrics": [],
}
PUBLIC = {"healthz"}
ADMIN: dict[str, tuple[str, dict[str, Any]]] = {
    "add_model": ("/v1/models", {"json": {"source": "org/model"}}),
    "add_alias": ("/v1/models/aliases", {"json": {"alias": "a", "model": "{base}"}}),
    "delete_model": ("/v1/models/{base}", {}),
    "read_metrics": ("/metrics", {}),
}


def _operations(app: FastAPI) -> dict[str, tuple[str, str]]:
    paths = app.openapi()["paths"]
    return {one["operationId"]: (method, path) for path, ways in paths.items() for method, one in ways.items()}


def _job_with_everything(session: Any, owner: Project) -> tuple[Job, str]:
    job = rows.job(session, owner, State.SUCCEEDED)
    assert job.tuned_model
    session.add(Checkpoint(id=f"ftckpt_{job.id}", job_id=job.id, step=1, model_id=job.tuned_model))
    session.add(
        Artifact(model_id=job.tuned_model, path="adapter.safetensors", bytes=1, sha256="0" * 64, key=f"jobs/{job.id}/a")
    )
    return job, session.query(JobEvent.id).filter_by(job_id=job.id).first()[0]


@pytest.fixture
def names(team: Team, make_team: Callable[..., Team], database: Database, base: str) -> dict[str, str]:
    """Ids of the first team's objects, and of the second team's own."""
    other_team = make_team("beta")
    upload = team.http.post(
        "/v1/uploads", json={"bytes": 1, "filename": "t", "mime_type": "t", "purpose": "user_data"}
    ).json()["id"]
    part = team.http.post(f"/v1/uploads/{upload}/parts", **PART).json()["id"]
    with database.sessions.begin() as session:
        owner, other = session.get_one(Project, team.id), session.get_one(Project, other_team.id)
        job, event = _job_with_everything(session, owner)
        own_job, _ = _job_with_everything(session, other)
        endpoint = endpoints.create(
            session, owner.id, name="e", url="https://1.1.1.1/", event_types=["fine_tuning.job.failed"], allow=()
        )
        own_endpoint = endpoints.create(
            session, other.id, name="o", url="https://1.1.1.1/", event_types=["fine_tuning.job.failed"], allow=()
        )
        delivery = Delivery(id="wh_theirs", event_id=event, endpoint_id=endpoint.id, next_try_at=func.now())
        session.add(delivery)
        order = Order().model_dump(mode="json")
        measured = Baseline(
            id="ftbaseline-1", project_id=owner.id, model=base, eval_file=job.training_file, order=order
        )
        session.add(measured)
        session.flush()
        own = {"project_id": owner.id, "model_id": base, "request": {}, "answer": {}, "finish_reason": "stop"}
        session.add(CapturedRequest(id="chatcmpl-theirs", expires_at=func.clock_timestamp() + timedelta(1), **own))
        return {
            "captured": "chatcmpl-theirs",
            "baseline": measured.id,
            "file": job.training_file,
            "upload": upload,
            "part": part,
            "job": job.id,
            "tuned": str(job.tuned_model),
            "event": event,
            "checkpoint": f"ftckpt_{job.id}",
            "endpoint": endpoint.id,
            "own_endpoint": own_endpoint.id,
            "delivery": delivery.id,
            "base": base,
            "own": own_job.training_file,
            "own_job": own_job.id,
            "own_tuned": str(own_job.tuned_model),
            "other_key": other_team.key,
        }


def _filled(value: Any, names: dict[str, str]) -> Any:
    text = json.dumps(value)
    for name, id in names.items():
        text = text.replace(f"{{{name}}}", id)
    return json.loads(text)


def _ask(team: Team, method: str, path: str, options: dict[str, Any], names: dict[str, str], key: str | None) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {"authorization": ""}
    options = {**options, "json": _filled(options["json"], names)} if "json" in options else options
    return team.http.request(method, path.format(**names), headers=headers, follow_redirects=False, **options)


def test_every_operation_has_a_case(settings: Settings) -> None:
    assert set(_operations(create_app(settings))) == set(CASES)


def test_every_path_parameter_is_in_a_case(app: FastAPI) -> None:
    """A route that names an object in its path has at least one case."""
    operations = _operations(app)
    assert [name for name, (_, path) in operations.items() if "{" in path and not CASES[name]] == []


def test_another_projects_objects_are_not_found(app: FastAPI, team: Team, names: dict[str, str]) -> None:
    operations = _operations(app)
    wrong = []
    for operation, cases in CASES.items():
        for path, options in cases:
            method = operations[operation][0]
            answer = _ask(team, method, path, options, names, names["other_key"])
            if answer.status_code != 404 or "error" not in answer.json():
                wrong.append((operation, path, answer.status_code, answer.text))
    assert wrong == []


def test_nothing_was_changed_by_another_project(
    team: Team, app: FastAPI, names: dict[str, str], database: Database
) -> None:
    before = [team.http.get(path.format(**names)).json() for path in ("/v1/fine_tuning/jobs/{job}", "/v1/files/{file}")]
    test_another_projects_objects_are_not_found(app, team, names)
    after = [team.http.get(path.format(**names)).json() for path in ("/v1/fine_tuning/jobs/{job}", "/v1/files/{file}")]
    assert after == before
    with database.sessions() as session:
        assert session.get_one(Model, names["tuned"]).deleted_at is None


def test_lists_show_a_projects_own_objects_only(team: Team, names: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {names['other_key']}"}
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/v1/webhook_endpoints"):
        text = team.http.get(path, headers=headers).text
        assert not [id for name, id in names.items() if name in ("file", "job", "tuned", "endpoint") and id in text]


def test_no_route_works_without_a_key(app: FastAPI, team: Team, names: dict[str, str]) -> None:
    wrong = []
    for operation, (method, path) in _operations(app).items():
        if operation in PUBLIC:
            continue
        ids = {"file_id": "f", "upload_id": "u", "job_id": "j", "model": "m", "endpoint_id": "e", "baseline_id": "b"}
        filled = path.format(path="p", **ids)
        for key in (None, "tnr_wrong"):
            answer = _ask(team, method, filled, {}, names, key)
            if answer.status_code != 401:
                wrong.append((operation, key, answer.status_code))
    assert wrong == []


def test_admin_routes_refuse_plain_keys(app: FastAPI, team: Team, names: dict[str, str]) -> None:
    for operation, (path, options) in ADMIN.items():
        answer = _ask(team, _operations(app)[operation][0], path, options, names, team.key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), operation


def test_a_revoked_key_stops_at_once(team: Team, database: Database) -> None:
    from tunery.keys import auth

    assert team.http.get("/v1/models").status_code == 200
    with database.sessions.begin() as session:
        [key] = auth.list_keys(session, session.get_one(Project, team.id))
        auth.revoke_key(session, key.id)
    assert team.http.get("/v1/models").status_code == 401
