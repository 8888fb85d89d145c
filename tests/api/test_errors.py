"""All errors have one format, and a commit that fails is never answered with success."""

import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import httpx2
import pytest
from cloned_databases import Database
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai import APIStatusError, AzureOpenAI, NotFoundError
from pydantic import BaseModel, ValidationError
from sqlalchemy import text
from teams import BASE, TRAIN, Team

from api import errors
from api.dependencies import SessionDep
from api.schemas.base import Body
from tunery import errors as floor
from tunery import field_errors
from tunery.keys import auth
from tunery.settings import Settings

JOB = {"model": BASE, "training_file": "file-x"}


def _error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def _classes(kind: type[floor.TuneryError]) -> Iterator[type[floor.TuneryError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _classes(below)


def test_no_class_is_answered_with_409() -> None:
    """OpenAI's clients retry a 409."""
    assert 409 not in errors.STATUS.values()


def test_every_rejection_is_a_400() -> None:
    made = [kind.__new__(kind) for kind in _classes(floor.Rejected)]
    assert {errors.status_of(error) for error in made} == {400}


WRONG_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": BASE}, "training_file", "Missing required parameter: 'training_file'"),
    ({**JOB, "n_epoch": 3}, "n_epoch", "Unknown parameter: 'n_epoch'"),
    (
        {**JOB, "hyperparameters": {"n_epochs": 51}},
        "hyperparameters.n_epochs",
        "at most 50, or should be 'auto'.",
    ),
    ({**JOB, "hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "'auto'"),
    (
        {**JOB, "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 0}}}},
        "method.supervised.hyperparameters.batch_size",
        "at least 1",
    ),
    ({**JOB, "technique": {"type": "full", "r": 8}}, "technique.r", "A full fine-tune has no 'r'"),
    ({**JOB, "technique": {"type": "lora", "quant_type": "nf4"}}, "technique.quant_type", "LoRA has no"),
    ({**JOB, "technique": {"type": "lora", "r": 0}}, "technique.r", "should be at least 1."),
    ({**JOB, "technique": {"r": 8}}, "technique.type", "'technique.type' (full, lora or qlora)"),
    ({**JOB, "technique": "lora"}, "technique", 'an object in braces, like {"type": "lora"}'),
    ({**JOB, "schedule": 1}, "schedule", "an object in braces."),
    ({**JOB, "technique": {"type": "prefix"}}, "technique.type", "('prefix'): should be full, lora or qlora."),
    (
        {**JOB, "technique": {"type": "dora"}},
        "technique.type",
        '(\'dora\'): should be full, lora or qlora (did you mean {"type": "lora", "use_dora": true}?)',
    ),
    ({**JOB, "technique": {"type": "lora", "rank": 8}}, "technique.rank", "Did you mean 'technique.r'?"),
    ({**JOB, "technique": {"type": "full", "rank": 8}}, "technique.rank", "A full fine-tune has no 'rank'"),
    *(
        ({**JOB, "technique": {"type": kind, name: 1}}, f"technique.{name}", f"Did you mean '{meant}'?")
        for kind in ("full", "lora", "qlora")
        for name, meant in (
            ("learning_rate", "learning_rate"),
            ("lr", "learning_rate"),
            ("epochs", "method.supervised.hyperparameters.n_epochs"),
            ("warmup_ratio", "schedule.warmup_ratio"),
        )
    ),
    ({**JOB, "technique": {"type": "lora", "no": 1}}, "technique.no", "Remove it, or check its spelling"),
    ({**JOB, "technique": {"type": "full", "no": 1}}, "technique.no", "Remove it, or check its spelling"),
    ({**JOB, "sufix": "x"}, "sufix", "Did you mean 'suffix'?"),
    ({**JOB, "test_file": "file-x"}, "test_file", "Did you mean 'evaluation.test_file'?"),
    ({**JOB, "epochs": 2}, "epochs", "Did you mean 'method.supervised.hyperparameters.n_epochs'?"),
    ({**JOB, "colour": 2}, "colour", "Remove it, or check its spelling against /docs."),
    ({**JOB, "technique": {"type": "lora", "target_modules": []}}, "technique", "list at least one layer"),
    ({**JOB, "suffix": "a" * 65}, "suffix", "at most 64 characters"),
    ({**JOB, "suffix": ""}, "suffix", "at least 1 character"),
    ({**JOB, "seed": -1}, "seed", "should be at least 0."),
    ({**JOB, "metadata": {"k": 1}}, "metadata.k", "should be a string."),
    ({**JOB, "metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
    ({**JOB, "integrations": [{"type": "comet", "comet": {}}]}, "integrations.0.type", "should be wandb or mlflow"),
    ({**JOB, "resources": {"gpus": 3}}, "resources.gpus", "1, 2, 4 or 8"),
    ({**JOB, "resources": {"gpus": True}}, "resources.gpus", "a number, not true or false"),
    ({**JOB, "hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "not true or false, or should be"),
    ({**JOB, "hyperparameters": {"batch_size": True}}, "hyperparameters.batch_size", "a number, not true or false"),
    (
        {**JOB, "hyperparameters": {"learning_rate_multiplier": True}},
        "hyperparameters.learning_rate_multiplier",
        "a number, not true or false",
    ),
    ({**JOB, "technique": {"type": "lora", "r": True}}, "technique.r", "a number, not true or false"),
    ({**JOB, "packing": [None]}, "packing", "([null]): should be true or false."),
    ({**JOB, "seed": True}, "seed", "a number, not true or false"),
    ({**JOB, "priority": False}, "priority", "a number, not true or false"),
    ({**JOB, "evaluation": {"every_steps": "often"}}, "evaluation.every_steps", "'auto'"),
    (
        {**JOB, "evaluation": {"general": {"benchmark": "mmlu"}}},
        "evaluation.general.benchmark",
        "('mmlu'): should be 'default', the built-in questions (of ARC-Easy, PIQA and OpenBookQA), or a "
        "multiple-choice task of lm-evaluation-harness as 'lm_eval:NAME', such as 'lm_eval:hellaswag'.",
    ),
    (
        {**JOB, "replay": {"source": "mine.jsonl"}},
        "replay.source",
        "('mine.jsonl'): should be 'self', the built-in prompts answered by the base itself, or the id of a file",
    ),
    (
        {**JOB, "technique": {"type": "lora", "target_modules": ["q_proj", ".*mlp.*"]}},
        "technique.target_modules.1",
        "('.*mlp.*'): should be the name of a layer, of letters, digits, '_' and '.', such as 'q_proj'; patterns are "
        "not supported.",
    ),
    (
        {**JOB, "technique": {"type": "lora", "modules_to_save": ["lm_head\n"]}},
        "technique.modules_to_save.0",
        "a layer",
    ),
    ({**JOB, "learning_rate": 50}, "learning_rate", "(50): should be at most 1."),
    ({**JOB, "learning_rate": 1e-13}, "learning_rate", "(1e-13): should be at least 1e-12."),
    ({**JOB, "max_grad_norm": 1e-7}, "max_grad_norm", "(1e-07): should be at least 1e-06."),
    ({**JOB, "evaluation": {"every_steps": 10**10}}, "evaluation.every_steps", "should be at most 1000000000."),
    ({**JOB, "evaluation": {"max_rows": 10**10}}, "evaluation.max_rows", "should be at most 1000000000."),
    (
        {**JOB, "evaluation": {"general": {"items": 10**400}}},
        "evaluation.general.items",
        "should be at most 1000000000.",
    ),
    (
        {**JOB, "evaluation": {"general": {"prompts": 10**400}}},
        "evaluation.general.prompts",
        "should be at most 1000000000.",
    ),
]


def test_what_is_wrong_with_a_body(team: Team) -> None:
    for body, param, words in WRONG_BODIES:
        error = _error(team.http.post("/v1/fine_tuning/jobs", json=body), 400)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert words in error["message"]


JUNK: list[Any] = [True, -(2**70), 1e300, 0.5, "", "no", "x" * 10**7, [], [1] * 100, {}, {"a": 1}, {"type": "x"}]


def _parts(kind: Any, known: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """Adds the models inside `kind`, a type or an annotation, to `known`, and returns `known`."""
    for part in get_args(kind):
        _parts(part, known)
    if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in known:
        known.add(kind)
        for field in kind.model_fields.values():
            _parts(field.annotation, known)
    return known


def _bodies(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for below in kind.__subclasses__():
        yield below
        yield from _bodies(below)


def _faults(kind: type[BaseModel]) -> Iterator[dict[str, Any]]:
    for name in kind.model_fields:
        for junk in JUNK:
            try:
                kind.model_validate({name: junk})
            except ValidationError as error:
                yield from ({**fault} for fault in error.errors(include_url=False))
            except floor.InvalidValue:
                continue  # a check over several fields, with a message of its own


def test_no_reason_is_in_words_of_pydantic(app: FastAPI) -> None:
    """The junk violates each kind of bound that a body has; every reason is in our own words."""
    models: set[type[BaseModel]] = set()
    for body in _bodies(Body):
        _parts(body, models)
    said = {
        fault["type"]: (field_errors._words(fault), fault["msg"])
        for model in models
        for fault in _faults(model)
        if fault["type"] not in field_errors._MISSING and fault["type"] not in ("extra_forbidden", "union_tag_invalid")
    }
    assert said.keys() >= {"greater_than", "less_than_equal", "string_too_long", "bool_parsing", "list_type"}
    assert {kind for kind, (ours, _) in said.items() if ours == field_errors._OTHER_REASON} == set()
    assert {kind for kind, (ours, theirs) in said.items() if "nput" in ours or ours.endswith(theirs)} - {
        "value_error"
    } == set()


def test_no_reason_is_a_pattern(app: FastAPI) -> None:
    """A string's form is said in words: `formed` in tunery/field_reasons.py."""
    models: set[type[BaseModel]] = {Settings}
    for body in _bodies(Body):
        _parts(body, models)
    shown = [
        model for model in models if re.search("'type': 'str',[^{}]*'pattern'", str(model.__pydantic_core_schema__))
    ]
    assert shown == []


def _post(client: TestClient, route: str, body: bytes, kind: str = "application/json") -> httpx2.Response:
    return client.post(route, content=body, headers={"content-type": kind})


def test_no_body(team: Team) -> None:
    assert "no JSON body" in _error(team.http.post("/v1/fine_tuning/jobs"), 400)["message"]


BROKEN_BODIES: dict[bytes, str] = {
    b'{"model": ': "not valid JSON: Expecting value",
    b"[" * 9_000: "nested more than 32 deep",
    b'{"model": ' + b'{"k":' * 500 + b"1" + b"}" * 501: "nested more than 32 deep",
    b'{"model": NaN}': "NaN is not JSON",
    b'{"model": 1e999}': "too large",
    b'{"model": "\xff"}': "not UTF-8 (byte 12)",
    b"[]": "expected a JSON object",
}


def test_every_route_that_reads_json_says_what_is_wrong_with_it(app: FastAPI, admin: Team) -> None:
    routes = [
        re.sub("{.*?}", "x", path)
        for path, ways in app.openapi()["paths"].items()
        if "application/json" in ways.get("post", {}).get("requestBody", {}).get("content", {})
    ]
    assert "/v1/chat/completions" in routes
    for route in routes:
        for body, words in BROKEN_BODIES.items():
            assert words in _error(_post(admin.http, route, body), 400)["message"], (route, body[:20])
        error = _error(_post(admin.http, route, b'{"k": "v"}', "application/x-www-form-urlencoded"), 400)
        assert "Send it with 'Content-Type: application/json'" in error["message"]


@pytest.mark.parametrize(
    ("route", "body", "meant"),
    [
        ("/v1/fine_tuning/baselines", {"model": "m", "eval_file": "f", "shot": [0]}, "shots"),
        ("/v1/models/m/exports", {"merge": True}, "merged"),
        ("/v1/models/m/scorecards", {"evaluation": {"testfile": "f"}}, "evaluation.test_file"),
        ("/v1/models/m/capture", {"keepdays": 3}, "keep_days"),
        ("/v1/feedback", {"id": "x", "ratings": "good"}, "rating"),
        ("/v1/fine_tuning/jobs/j/rerun", {"sufix": "x"}, "suffix"),
    ],
)
def test_an_unknown_field_of_any_body_names_the_one_that_was_meant(
    admin: Team, route: str, body: dict[str, Any], meant: str
) -> None:
    error = _error(admin.http.post(route, json=body), 400)
    assert error["message"].endswith(f"Did you mean '{meant}'?")


def test_a_byte_order_mark_is_no_fault(team: Team) -> None:
    assert _error(_post(team.http, "/v1/fine_tuning/jobs", b"\xef\xbb\xbf{}"), 400)["param"] == "model"


def test_wrong_query(team: Team) -> None:
    error = _error(team.http.get("/v1/fine_tuning/jobs?limit=0"), 400)
    assert error["param"] == "limit"


@pytest.mark.parametrize(
    ("url", "param", "words"),
    [
        ("/v1/fine_tuning/jobs?limt=5", "limt", "Unknown query parameter: 'limt'. Did you mean 'limit'?"),
        ("/v1/fine_tuning/jobs?metadata[team=x", "metadata[team", "Did you mean 'metadata'?"),
        ("/v1/fine_tuning/jobs?metadata=x", "metadata", "should be 'null'."),
        ("/v1/fine_tuning/jobs?limit[x]=5", "limit[x]", "Did you mean 'limit'?"),
        (
            "/v1/fine_tuning/jobs?limit=5&limit=6",
            "limit",
            "The query parameter 'limit' is given 2 times. Send it once.",
        ),
        ("/v1/fine_tuning/jobs?metadata[k]=0&metadata[k]=1", "metadata[k]", "is given 2 times. Send it once."),
        ("/v1/fine_tuning/jobs?LIMIT=5", "LIMIT", "Did you mean 'limit'?"),
        ("/v1/files?colour=red", "colour", "This route has purpose, limit, order, after."),
        ("/v1/files/file-x?after=1", "after", "This route has none: remove it."),
        ("/v1/organization/usage/completions?start_time=0&models=a", "models", "Did you mean 'models[]'?"),
        (f"/v1/models?{'x' * 100}=1", "x" * 40 + "...", "This route has status."),
        ("/metrics?match=x", "match", "This route has none"),
    ],
)
def test_unknown_query_parameter_is_refused(admin: Team, url: str, param: str, words: str) -> None:
    error = _error(admin.http.get(url), 400)
    assert (error["param"], error["type"], error["code"]) == (param, "invalid_request_error", "invalid_value")
    assert words in error["message"]


def test_unknown_query_parameter_is_refused_by_every_route(app: FastAPI, admin: Team) -> None:
    for path, ways in app.openapi()["paths"].items():
        for way in ways.keys() - ({"get"} if path == "/healthz" else set()):
            body = {"json": {}} if way == "post" else {}
            answer = admin.http.request(way, re.sub("{.*?}", "x", path), params={"no_such_name": "1"}, **body)
            assert answer.status_code == 400, (way, path)


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ({"azure_endpoint": "http://testserver", "api_key": "KEY"}, 404),
        ({"base_url": "http://testserver/v1", "api_key": "KEY"}, 401),
        ({"base_url": "http://testserver/v1", "azure_ad_token": "KEY"}, 400),
    ],
)
def test_azures_client_is_told_to_use_openais(
    team: Team, anonymous: TestClient, client: dict[str, str], status: int
) -> None:
    """Its routes, its key header and its query differ, so that no setting makes it work."""
    given = {name: value.replace("KEY", team.key) for name, value in client.items()}
    azure = AzureOpenAI(api_version="2024-10-21", http_client=anonymous, max_retries=0, **given)  # type: ignore[arg-type]
    with pytest.raises(APIStatusError) as refused:
        azure.files.list()
    assert refused.value.status_code == status
    assert "use the client OpenAI(base_url='http://HOST/v1', api_key=...)" in refused.value.message
    with pytest.raises(NotFoundError, match="in place of AzureOpenAI"):
        azure.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])


def test_no_key_is_said_before_an_unknown_query_parameter(anonymous: TestClient) -> None:
    assert anonymous.get("/v1/files?colour=red").status_code == 401


def test_what_is_not_supported_is_said_before_an_unknown_query_parameter(team: Team) -> None:
    error = _error(team.http.get("/v1/fine_tuning/checkpoints/x/permissions?project_id=y"), 404)
    assert "not supported" in error["message"]


def test_text_that_cannot_be_stored(team: Team, base: str) -> None:
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN}).json()["id"]
    headers = {"content-type": "application/json"}
    for value in (rb"\u0000", rb"\ud800"):
        for body in (
            b'{"model":"'
            + BASE.encode()
            + b'","training_file":"'
            + file.encode()
            + b'","metadata":{"k":"'
            + value
            + b'"}}',
            b'{"model":"' + value + b'","training_file":"x"}',
        ):
            error = _error(team.http.post("/v1/fine_tuning/jobs", content=body, headers=headers), 400)
            assert "Remove it" in error["message"] or "half a surrogate pair" in error["message"]
    for path in ("/v1/files/%00", "/v1/models/%00", "/v1/fine_tuning/jobs?metadata[k]=%00", "/v1/files?after=%00"):
        assert "Remove it" in _error(team.http.get(path), 400)["message"]


def test_number_beyond_64_bits_is_named(team: Team, base: str) -> None:
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN}).json()["id"]
    job = team.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file}).json()["id"]
    error = _error(team.http.get(f"/v1/fine_tuning/jobs/{job}/metrics?after_step={10**30}"), 400)
    assert "too large" in error["message"]
    assert "NUL" not in error["message"]


def test_responses_are_kept_nowhere(team: Team) -> None:
    message = _error(team.http.get("/v1/responses/resp_x"), 404)["message"]
    assert "'resp_x': this server stores none" in message


def test_unknown_route_and_wrong_method(team: Team, anonymous: TestClient) -> None:
    error = _error(team.http.get("/v1/fine_tuning/jobz"), 404)
    assert "Invalid URL (GET /v1/fine_tuning/jobz)" in error["message"]
    answer = team.http.put("/v1/files")
    error = _error(answer, 405)
    assert (error["code"], answer.headers["allow"]) == ("method_not_allowed", "GET, POST")
    assert error["message"] == "Invalid method for URL (PUT /v1/files). Use GET, POST."
    assert team.http.patch("/v1/webhook_endpoints/we_x").headers["allow"] == "GET, POST, DELETE"
    assert team.http.delete("/openapi.json").headers["allow"] == "GET, HEAD"
    assert _error(anonymous.get("/v1/files"), 401)["code"] == "invalid_api_key"
    assert anonymous.get("/v1/files").headers["www-authenticate"] == "Bearer"
    _error(anonymous.get("/docs/../secret.js"), 404)


def test_a_path_that_is_nearly_a_route_is_corrected(team: Team, anonymous: TestClient) -> None:
    for url in ("/models", "/fine_tuning/jobs/ftjob-x"):
        assert f"Did you mean /v1{url}?" in _error(anonymous.get(url), 404)["message"]
    for url in ("/v1/fine_tuning/jobs/", "/fine_tuning/jobs/"):
        assert "Did you mean /v1/fine_tuning/jobs?" in _error(team.http.get(url), 404)["message"]
    for wrong in (team.http.get("/modelz"), team.http.put("/models"), team.http.get("/v1/jobs/")):
        assert "Did you mean" not in _error(wrong, 404)["message"]


def test_a_load_balancer_may_send_head(team: Team, anonymous: TestClient) -> None:
    for answer in (anonymous.head("/healthz"), team.http.head("/v1/models")):
        assert (answer.status_code, answer.content) == (200, b"")
    assert anonymous.head("/v1/models").status_code == 401
    assert team.http.post("/healthz").headers["allow"] == "GET, HEAD"
    assert "head" not in team.http.get("/openapi.json").json()["paths"]["/healthz"]


def test_the_error_about_an_unknown_model_names_both_ways_to_add_one(team: Team) -> None:
    message = _error(team.http.get("/v1/models/gpt-4o-mini-2024-07-18"), 404)["message"]
    assert "`tunery models add`" in message
    assert "`tunery models alias NAME MODEL`" in message


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_too_much_json(kind: str, team: Team) -> None:
    """The limit holds for every content type, because the body is kept in memory."""
    limit = 2**20
    error = _error(_post(team.http, "/v1/fine_tuning/jobs", b'{"model":"' + b"x" * limit + b'"}', kind), 413)
    assert str(limit) in error["message"]


def test_quota_is_not_worth_a_retry(make_team: Callable[..., Team], base: str) -> None:
    team = make_team("small", max_queued=1)
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN}).json()["id"]
    assert team.http.post("/v1/fine_tuning/jobs", json={**JOB, "training_file": file}).status_code == 200
    answer = team.http.post("/v1/fine_tuning/jobs", json={**JOB, "training_file": file})
    error = _error(answer, 429)
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"


def test_a_failing_commit_is_not_answered_with_success(team: Team, database: Database, base: str) -> None:
    """The database refuses at the commit itself, after the route has built its response."""
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN}).json()["id"]
    with database.sessions.begin() as session:
        session.execute(text("CREATE TABLE refusals (job text REFERENCES projects(id) DEFERRABLE INITIALLY DEFERRED)"))
        session.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$BEGIN INSERT INTO refusals VALUES ('none'); RETURN NEW; END$$"
            )
        )
        session.execute(text("CREATE TRIGGER refuse AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()"))
    answer = team.http.post("/v1/fine_tuning/jobs", json={**JOB, "training_file": file})
    error = _error(answer, 500)
    assert answer.headers["x-request-id"] in error["message"]
    assert "refusals" not in answer.text
    assert team.http.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_an_unforeseen_error_tells_its_id_and_nothing_else(app: FastAPI) -> None:
    @app.get("/boom")
    def boom(session: SessionDep) -> None:
        raise ZeroDivisionError("secret detail")

    answer = TestClient(app).get("/boom")
    error = _error(answer, 500)
    assert error["type"] == "server_error"
    assert "secret" not in answer.text


def test_a_database_that_is_not_migrated_is_named_with_the_command(
    make_app: Callable[..., FastAPI], postgres: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"authorization": f"Bearer {auth.new_secret()}"}
    with TestClient(make_app(database_url=postgres("postgres")), headers=headers) as client:
        answer = client.get("/v1/models")
    error = _error(answer, 503)
    assert error["code"] == "not_migrated"
    assert "`alembic upgrade head`" in error["message"]
    assert answer.headers["x-request-id"] in caplog.text
    assert "Traceback" not in caplog.text


def test_database_away(make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(database_url="postgresql+psycopg://nobody@127.0.0.1:1/none")
    client = TestClient(app, headers={"authorization": "Bearer tnr_x"})
    answer = client.get("/healthz")
    assert "The database does not answer" in _error(answer, 503)["message"]
    # Without what other threads say at the same time, as that no worker can be woken.
    assert [record.getMessage() for record in caplog.records if record.name == "api.errors"] == [
        f"{answer.headers['x-request-id']}: GET /healthz failed: connection failed: connection to server at "
        '"127.0.0.1", port 1 failed: Connection refused'
    ]
    assert float(answer.headers["retry-after"]) > 0


def test_health(anonymous: TestClient) -> None:
    assert anonymous.get("/healthz").json() == {"status": "ok"}


def test_a_refused_upload_is_read_to_its_end(live: str) -> None:
    """A client that is still sending when the response comes would see a broken pipe instead of the reason."""
    sent = 0

    def packets() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 2**18
            yield b"x" * 2**18

    headers = {"content-type": "multipart/form-data; boundary=b", "authorization": "Bearer tnr_wrong"}
    with httpx2.Client(trust_env=False) as client:
        answer = client.post(f"{live}/v1/files", content=packets(), headers=headers)
    assert _error(answer, 401)["code"] == "invalid_api_key"
    assert sent == 2**24
