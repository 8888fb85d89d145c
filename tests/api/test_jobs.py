"""Creating jobs: what is refused and why, what is stored, and when a repeated request returns the same job."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from unittest.mock import ANY

import pytest
import rows
from cloned_databases import Database
from teams import ALIAS, BASE, LINE, SOURCE, TRAIN, Team

from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models import registry
from tunery.models.model import Model
from tunery.spec import Full, Gate, Lora, Qlora, Technique, TrainingSpec

ROUTE = "/v1/fine_tuning/jobs"


@pytest.fixture
def file(team: Team) -> str:
    return _upload(team, TRAIN)


def _upload(team: Team, data: bytes, purpose: str = "fine-tune") -> str:
    id: str = team.http.post("/v1/files", data={"purpose": purpose}, files={"file": data}).json()["id"]
    return id


def _create(team: Team, file: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return team.http.post(ROUTE, json={"model": BASE, "training_file": file, **body}, headers=headers)


def _refused(answer: Any, status: int, param: str | None, words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_the_key_order_is_openais(team: Team, file: str, base: str) -> None:
    keys = list(_create(team, file).json())
    assert keys[:22] == [
        "object", "id", "model", "created_at", "finished_at", "fine_tuned_model", "organization_id", "result_files",
        "status", "validation_file", "training_file", "hyperparameters", "method", "metadata", "error", "seed",
        "trained_tokens", "estimated_finish", "integrations", "user_provided_suffix", "usage_metrics",
        "shared_with_openai",
    ]  # fmt: skip


def test_second_precision_is_refused_where_there_is_one(team: Team, file: str, base: str) -> None:
    param = "evaluation.unquantised"
    _refused(_create(team, file, evaluation={"unquantised": True}), 400, param, "Send evaluation.test_file too")
    both = {"evaluation": {"unquantised": True, "test_file": _upload(team, (LINE * 13).encode())}}
    for kind in ("lora", "full"):
        answer = _create(team, file, technique={"type": kind}, **both)
        _refused(answer, 400, param, f"the base of {kind} is not quantised")
    assert _create(team, file, technique={"type": "qlora"}, **both).json()["evaluation"]["unquantised"] is True


def test_test_file_that_equals_the_training_file_is_refused(team: Team, file: str, base: str) -> None:
    for same in (file, _upload(team, TRAIN)):
        scored = {"evaluation": {"test_file": same}}
        _refused(_create(team, file, **scored), 400, "evaluation.test_file", "equals the training file")
        assert _create(team, file, **scored, allow_test_on_training_file=True).status_code == 200
    other = _upload(team, TRAIN.replace(b'"q"', b'"another"'))
    assert _create(team, file, evaluation={"test_file": other}).status_code == 200


def test_technique_that_the_base_cannot_is_refused_when_the_job_is_made(
    team: Team, file: str, base: str, database: Database
) -> None:
    assert team.http.get(f"/v1/models/{base}").json()["techniques"] is None, "never tried"
    reasons = {"lora": None, "qlora": "it has no linear layers", "full": None}
    with database.sessions.begin() as session:
        row = session.get_one(Model, base)
        row.model_info = {**row.model_info, "techniques": reasons, "dropout": "not on experts"}

    refused = _create(team, file, technique={"type": "qlora"})

    _refused(refused, 400, "technique.type", "with qlora (it has no linear layers). Use technique 'lora'.")
    _refused(
        _create(team, file, technique={"type": "lora", "dropout": 0.1}), 400, "technique.dropout", "Set dropout to 0"
    )
    assert _create(team, file, technique={"type": "lora"}).status_code == 200
    assert team.http.get(f"/v1/models/{base}").json()["techniques"] == reasons


def test_layers_that_the_base_does_not_have_are_named(team: Team, file: str, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        row = session.get_one(Model, base)
        row.model_info = {**row.model_info, "linear_modules": ["layers.*.mlp.up_proj", "layers.*.self_attn.q_proj"]}

    refused = _create(team, file, technique={"type": "lora", "target_modules": ["q_proj", "foo_proj"]})

    _refused(refused, 400, "technique.target_modules", "no linear layer 'foo_proj'")
    assert "up_proj, q_proj" in refused.json()["error"]["message"]
    assert _create(team, file, technique={"type": "lora", "target_modules": ["q_proj"]}).status_code == 200


def test_what_is_stored(team: Team, file: str, base: str, database: Database) -> None:
    job = _create(team, file, technique={"type": "qlora", "r": 8}, seed=7, resources={"gpus": 2}, priority=-1).json()
    with database.sessions() as session:
        row = session.get_one(Job, job["id"])
        spec = TrainingSpec.model_validate(row.spec)
        assert (row.project_id, row.base_model, row.gpus, row.priority) == (team.id, BASE, 2, -1)
        assert row.key_id
        assert spec.technique == Qlora(r=8)
        assert spec.seed == 7
        assert row.user_metadata is None


def test_stored_job_of_an_older_release_is_answered(team: Team, file: str, base: str, database: Database) -> None:
    """It lacks options that were added later, and has values that were legal then but are out of bounds today."""
    job = _create(team, file, packing=True).json()["id"]
    with database.sessions.begin() as session:
        row = session.get_one(Job, job)
        row.spec = {name: value for name, value in row.spec.items() if name != "packing"} | {"max_seq_length": 8}
    answer = team.http.get(f"{ROUTE}/{job}").json()
    assert (answer["packing"], answer["max_seq_length"]) == (False, 8)


def test_seeds_are_drawn(team: Team, file: str, base: str) -> None:
    assert len({_create(team, file).json()["seed"] for _ in range(3)}) == 3


def test_unknown_models(team: Team, file: str, base: str, database: Database) -> None:
    _refused(_create(team, file, model="gpt-9"), 404, "model", "'gpt-9' does not exist")
    assert _create(team, file, model="gpt-9").json()["error"]["code"] == "model_not_found"
    with database.sessions.begin() as session:
        rows.base(session, "late", status="processing", manifest=None, manifest_sha256=None)
    _refused(_create(team, file, model="late"), 400, "model", "still being prepared")
    _refused(_create(team, file, model="late"), 400, "model", "`GET /v1/models/late` shows its status")


def test_unusable_files(team: Team, file: str, base: str) -> None:
    _refused(_create(team, "file-none"), 404, "training_file", "'file-none'")
    _refused(_create(team, file, validation_file="file-none"), 404, "validation_file", "'file-none'")
    _refused(_create(team, file, evaluation={"test_file": "file-none"}), 404, "evaluation.test_file", "'file-none'")
    picture = _upload(team, b"\x89PNG", "vision")
    _refused(_create(team, picture), 400, "training_file", "purpose 'fine-tune'")


def test_preference_tuning_is_echoed(team: Team, file: str, base: str) -> None:
    knobs = {"beta": 0.2, "loss": "ipo", "n_epochs": 2}
    job = _create(team, file, method={"type": "dpo", "dpo": {"hyperparameters": knobs}}).json()

    every = {"batch_size": "auto", "learning_rate_multiplier": "auto", **knobs}
    assert job["method"] == {"type": "dpo", "dpo": {"hyperparameters": every}}
    assert _create(team, file, method={"type": "dpo"}).json()["method"]["dpo"]["hyperparameters"]["beta"] == "auto"


@pytest.mark.parametrize(
    ("knobs", "param", "words"),
    [
        ({"beta": 0}, "beta", "should be more than 0"),
        ({"beta": True}, "beta", "true or false"),
        ({"loss": "hinge"}, "loss", "'sigmoid', 'ipo' or 'dpo_norm'"),
        ({"betta": 0.1}, "betta", "Unknown parameter"),
    ],
)
def test_wrong_knobs_of_preference_tuning_are_refused(
    team: Team, file: str, base: str, knobs: dict[str, Any], param: str, words: str
) -> None:
    answer = _create(team, file, method={"type": "dpo", "dpo": {"hyperparameters": knobs}})

    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith("method.dpo.hyperparameters.")
    assert error["param"].split(".")[3] == param
    assert words in error["message"]


@pytest.mark.parametrize("method", ["reinforcement", "sft"])
def test_other_methods_are_refused_by_name(method: str, team: Team, file: str, base: str) -> None:
    named = {} if method == "sft" else {method: {"hyperparameters": {"n_epochs": 1}}}
    answer = _create(team, file, method={"type": method, **named})
    _refused(answer, 400, "method.type", f"Method '{method}' is not supported. Use method.type 'supervised'")


def test_contradictions(team: Team, file: str, base: str) -> None:
    knobs: dict[str, Any] = {"hyperparameters": {"learning_rate_multiplier": 2}}
    _refused(_create(team, file, learning_rate=1e-4, **knobs), 400, "learning_rate", "Send one of them")
    _refused(_create(team, file, early_stopping={}), 400, "early_stopping", "validation_file")
    _refused(_create(team, file, select="best"), 400, "select", "validation_file")
    both: dict[str, Any] = {
        "hyperparameters": {"n_epochs": 1},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {}}},
    }
    _refused(_create(team, file, **both), 400, "hyperparameters", "differ")
    mixed = {"type": "supervised", "dpo": {}}
    _refused(_create(team, file, method=mixed), 400, "method.dpo", "method.type is 'supervised'")
    unknown = {"type": "supervised", "kto": {}}
    _refused(_create(team, file, method=unknown), 400, "method.kto", "Unknown parameter: 'method.kto'")
    assert team.http.get(ROUTE).json()["data"] == []


def test_old_clients_send_knobs_at_the_top(team: Team, file: str, base: str) -> None:
    job = _create(team, file, hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 0.5}).json()
    assert job["hyperparameters"] == {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"] | {"loss_on": "assistant"}


def test_loss_on_is_of_supervised_training_alone(team: Team, file: str, base: str) -> None:
    supervised = {"type": "supervised", "supervised": {"hyperparameters": {"loss_on": "last_assistant"}}}
    made = _create(team, file, method=supervised).json()
    assert made["method"]["supervised"]["hyperparameters"]["loss_on"] == "last_assistant"

    pairs = {"type": "dpo", "dpo": {"hyperparameters": {"loss_on": "all"}}}
    param = "method.dpo.hyperparameters.loss_on"
    _refused(_create(team, file, method=pairs), 400, param, f"Unknown parameter: '{param}'")
    supervised["supervised"]["hyperparameters"]["loss_on"] = "user"  # type: ignore[index]
    _refused(_create(team, file, method=supervised), 400, "method.supervised.hyperparameters.loss_on", "'all'")


@pytest.mark.parametrize(("name", "shown"), [(BASE, BASE), (ALIAS, ALIAS), (SOURCE, BASE)])
def test_a_base_by_any_of_its_names(name: str, shown: str, team: Team, file: str, base: str) -> None:
    made = _create(team, file, model=name).json()
    assert (made["model"], made["base_model"]) == (shown, BASE)
    assert team.http.get(f"{ROUTE}/{made['id']}").json() == made
    assert team.http.get(ROUTE).json()["data"] == [made]


def test_a_job_keeps_the_alias_that_it_was_asked_by(
    team: Team, admin: Team, file: str, base: str, database: Database
) -> None:
    job = _create(team, file, model=ALIAS).json()["id"]
    with database.sessions.begin() as session:
        rows.base(session, "other")
    assert admin.http.post("/v1/models/aliases", json={"alias": ALIAS, "model": "other"}).status_code == 200

    moved = team.http.get(f"{ROUTE}/{job}").json()

    assert (moved["model"], moved["base_model"]) == (ALIAS, BASE)


@pytest.mark.parametrize(
    ("asked", "defaults"),
    [
        ({"type": "wandb", "wandb": {"project": "p"}}, {"name": None, "entity": None, "tags": []}),
        ({"type": "mlflow", "mlflow": {"experiment_name": "e"}}, {"run_name": None}),
    ],
    ids=["wandb", "mlflow"],
)
def test_trackers_are_echoed_with_the_runs_id(
    team: Team, file: str, base: str, asked: dict[str, Any], defaults: dict[str, Any]
) -> None:
    job = _create(team, file, integrations=[asked]).json()
    kind = asked["type"]
    assert job["integrations"] == [{"type": kind, kind: {**asked[kind], **defaults, "run_id": job["id"]}}]
    assert job["warnings"] == []
    again = team.http.post(f"{ROUTE}/{job['id']}/rerun").json()
    assert again["integrations"] == [{"type": kind, kind: {**asked[kind], **defaults, "run_id": again["id"]}}]


def test_a_request_cannot_say_where_a_tracker_is(team: Team, file: str, base: str) -> None:
    """Otherwise the operator's worker would post to any address that a request names."""
    mlflow = {"experiment_name": "e", "tracking_uri": "http://10.0.0.1"}
    answer = _create(team, file, integrations=[{"type": "mlflow", "mlflow": mlflow}])
    _refused(answer, 400, "integrations.0.mlflow.tracking_uri", "Unknown parameter")
    other = _create(team, file, integrations=[{"type": "comet", "comet": {}}])
    _refused(other, 400, "integrations.0.type", "should be wandb or mlflow")


# --- the same request twice ---------------------------------------------------------------------------------------


def test_idempotency_key(team: Team, file: str, base: str) -> None:
    first = _create(team, file, {"idempotency-key": "k1"}).json()["id"]
    assert _create(team, file, {"idempotency-key": "k1"}).json()["id"] == first
    assert _create(team, file, {"idempotency-key": "k2"}).json()["id"] != first
    _refused(_create(team, file, {"idempotency-key": "k1"}, seed=1), 400, "Idempotency-Key", first)


def test_an_empty_idempotency_key_is_none(team: Team, file: str, base: str) -> None:
    first = _create(team, file, {"idempotency-key": ""}).json()["id"]
    assert _create(team, file, {"idempotency-key": ""}).json()["id"] != first
    assert _create(team, file, {"idempotency-key": ""}, seed=1).status_code == 200


def test_twins_in_flight_make_one_job(team: Team, file: str, base: str, database: Database) -> None:
    def create(_: int) -> str:
        id: str = _create(team, file, {"idempotency-key": "k"}).json()["id"]
        return id

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(create, range(6)))) == 1
    assert len(team.http.get(ROUTE).json()["data"]) == 1


def test_a_clients_own_retry(team: Team, file: str, base: str, database: Database) -> None:
    first = _create(team, file).json()["id"]
    retry = {"x-stainless-retry-count": "1"}
    assert _create(team, file, retry).json()["id"] == first
    assert _create(team, file, retry, seed=1).json()["id"] != first, "a different request"
    assert _create(team, file, {"x-stainless-retry-count": "0"}).json()["id"] != first, "a person who asked twice"
    with database.sessions.begin() as session:
        for row in session.query(Job):
            row.created_at = rows.LONG_AGO
    assert _create(team, file, retry).json()["id"] != first, "half an hour later"


def test_another_projects_key_is_another_key(team: Team, file: str, base: str, make_team: Any) -> None:
    other = make_team("beta")
    first = _create(team, file, {"idempotency-key": "k"}).json()["id"]
    second = _create(other, _upload(other, TRAIN), {"idempotency-key": "k"}).json()["id"]
    assert first != second


# --- continued training -------------------------------------------------------------------------------------------


SHAPE = Lora(r=4, target_modules=["q_proj"], use_dora=True)


@pytest.fixture
def parent(team: Team, base: str, database: Database) -> str:
    """The id of a LoRA adapter of SHAPE that one of the team's jobs made."""
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        job = rows.job(session, owner, base_model=base)
        rows.bring(session, job, State.SUCCEEDED)
        job.plan = {
            **(job.plan or {}),
            "technique": SHAPE.model_dump(mode="json"),
        }
        return str(job.tuned_model)


def _of_a_newer_release(stored: Any) -> Any:
    """Returns the JSON with one more field in each of its objects."""
    if isinstance(stored, list):
        return [_of_a_newer_release(each) for each in stored]
    if not isinstance(stored, dict):
        return stored
    return {name: _of_a_newer_release(each) for name, each in stored.items()} | {"of_a_newer_release": 1}


@pytest.mark.parametrize("method", [{"type": "supervised"}, {"type": "dpo"}])
def test_what_a_newer_worker_stored_is_shown_without_its_new_fields(
    team: Team, database: Database, method: dict[str, Any]
) -> None:
    """In an upgrade the workers are replaced before the API, which shows their jobs meanwhile."""
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, team.id), state=State.SUCCEEDED)
        decided = rows.plan(method=method, gate=Gate(max_kl=0.1), evaluation={"max_rows": 8}).model_dump(mode="json")
        job.plan, job.gate = _of_a_newer_release(decided), {"status": "passed", "withheld": False, "checks": []}
        session.flush()
        id, plain = job.id, decided
    shown = team.http.get(f"/v1/fine_tuning/jobs/{id}")
    assert shown.status_code == 200, shown.text
    assert "newer_release" not in shown.text
    for name in ("technique", "resources", "schedule", "evaluation"):
        assert shown.json()[name] == plain[name]
    assert [each["id"] for each in team.http.get("/v1/fine_tuning/jobs").json()["data"]] == [id]


def test_training_on_keeps_the_adapters_shape(team: Team, file: str, parent: str, database: Database) -> None:
    job = _create(team, file, model=parent).json()
    assert job["model"] == parent
    assert job["technique"] == SHAPE.model_dump(mode="json")
    with database.sessions() as session:
        row = session.get_one(Job, job["id"])
        assert (row.base_model, row.parent_model) == (BASE, parent)


def test_training_on_keeps_the_alias(team: Team, file: str, parent: str, database: Database) -> None:
    with database.sessions.begin() as session:
        session.get_one(Job, session.get_one(Model, parent).job_id).base_alias = ALIAS
    job = _create(team, file, model=parent).json()
    assert (job["model"], job["base_model"]) == (parent, BASE)
    with database.sessions() as session:
        assert session.get_one(Job, job["id"]).base_name == ALIAS


def test_training_on_in_another_shape(team: Team, file: str, parent: str, database: Database) -> None:
    same = {"type": "lora", "r": 4, "target_modules": ["q_proj"], "use_dora": True, "dropout": 0.1}
    assert _create(team, file, model=parent, technique=same).json()["technique"]["dropout"] == 0.1
    _refused(_create(team, file, model=parent, technique={**same, "r": 8}), 400, "technique.r", "has r 4")
    _refused(_create(team, file, model=parent, technique={"type": "full"}), 400, "technique.type", "Use 'lora'")
    plain = _create(team, file, model=parent, technique={**same, "use_dora": False})
    _refused(plain, 400, "technique.use_dora", "has use_dora True")


def _made_by(database: Database, parent: str, technique: Technique | None) -> None:
    """Gives the parent's job another technique, or removes its plan."""
    with database.sessions.begin() as session:
        model = session.get_one(Model, parent)
        model.technique = technique.type if technique else None
        job = session.get_one(Job, model.job_id)
        job.plan = {**(job.plan or {}), "technique": technique.model_dump(mode="json")} if technique else None


def test_training_on_from_four_bits(team: Team, file: str, parent: str, database: Database) -> None:
    own = Qlora(r=4, double_quant=False)
    _made_by(database, parent, own)
    assert _create(team, file, model=parent).json()["technique"] == own.model_dump(mode="json")
    same = {"type": "qlora", "r": 4, "double_quant": False}
    assert _create(team, file, model=parent, technique={**same, "dropout": 0.1}).json()["technique"]["dropout"] == 0.1
    other = _create(team, file, model=parent, technique={**same, "double_quant": True})
    _refused(other, 400, "technique.double_quant", "has double_quant False")
    assert _create(team, file, model=parent, technique={"type": "lora", "r": 4}).json()["technique"]["type"] == "lora"


def test_training_on_from_a_full_fine_tune(team: Team, file: str, parent: str, database: Database) -> None:
    _made_by(database, parent, Full())
    assert _create(team, file, model=parent).json()["technique"] == Full().model_dump(mode="json")
    wide = {"type": "full", "weights_dtype": "float32"}
    assert _create(team, file, model=parent, technique=wide).json()["technique"] == wide


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapter_on_a_full_fine_tune_has_that_as_its_base(
    team: Team, file: str, parent: str, database: Database, kind: str
) -> None:
    _made_by(database, parent, Full())
    job = _create(team, file, model=parent, technique={"type": kind, "r": 8}).json()
    assert (job["model"], job["base_model"], job["technique"]["r"]) == (parent, parent, 8)
    with database.sessions.begin() as session:
        row = session.get_one(Job, job["id"])
        assert (row.base_name, row.base_model, row.parent_model) == (BASE, parent, parent)
        assert row.inputs == {"training_file": ANY, "base": "2" * 64, "parent": "2" * 64}
        rows.bring(session, row, State.SUCCEEDED)
        adapter = row.tuned_model
    again = _create(team, file, model=adapter).json()
    assert (again["model"], again["base_model"]) == (adapter, parent)


def test_training_on_from_a_model_without_a_record(team: Team, file: str, parent: str, database: Database) -> None:
    _made_by(database, parent, None)
    _refused(_create(team, file, model=parent), 400, "model", f"Start from its base, '{BASE}'")


def test_a_deleted_parent(team: Team, file: str, parent: str, database: Database) -> None:
    with database.sessions.begin() as session:
        registry.delete(session, session.get_one(Model, parent))
    _refused(_create(team, file, model=parent), 404, "model", "does not exist")


# --- an owner's actions -------------------------------------------------------------------------------------------


def test_a_running_job_that_shall_pause_reads_paused(team: Team, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, team.id), State.RUNNING).id
    assert team.http.get(f"{ROUTE}/{job}").json()["status"] == "running"
    assert team.http.post(f"{ROUTE}/{job}/pause").json()["status"] == "paused"
    with database.sessions() as session:
        assert session.get_one(Job, job).state == State.RUNNING
    assert team.http.post(f"{ROUTE}/{job}/resume").json()["status"] == "running"


def test_only_a_running_job_says_when_it_ends(team: Team, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, team.id), State.RUNNING)
        job.estimated_finish = datetime(2100, 1, 1, tzinfo=UTC)
    finish = int(job.estimated_finish.timestamp())
    assert team.http.get(f"{ROUTE}/{job.id}").json()["estimated_finish"] == finish
    assert team.http.post(f"{ROUTE}/{job.id}/pause").json()["estimated_finish"] is None
    assert team.http.post(f"{ROUTE}/{job.id}/resume").json()["estimated_finish"] == finish


def test_a_run_that_saves_after_its_last_step_does_not_end_in_the_past(
    team: Team, base: str, database: Database
) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, team.id), State.RUNNING)
        job.estimated_finish = rows.LONG_AGO
    assert team.http.get(f"{ROUTE}/{job.id}").json()["estimated_finish"] > time.time()


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_actions_on_an_ended_job_are_400(action: str, team: Team, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, team.id), State.SUCCEEDED).id
    answer = team.http.post(f"{ROUTE}/{job}/{action}")
    _refused(answer, 400, None, "is succeeded")
    assert answer.json()["error"]["code"] == "wrong_state"


def test_pages_are_stable_while_jobs_arrive(team: Team, file: str, base: str) -> None:
    made = [_create(team, file).json()["id"] for _ in range(5)]
    first = team.http.get(f"{ROUTE}?limit=2").json()
    assert ([job["id"] for job in first["data"]], first["has_more"]) == (made[:2:-1], True)
    _create(team, file)
    second = team.http.get(f"{ROUTE}?limit=3&after={first['data'][-1]['id']}").json()
    assert ([job["id"] for job in second["data"]], second["has_more"]) == (made[2::-1], False)


def test_metadata_filters(team: Team, file: str, base: str) -> None:
    empty = _create(team, file, metadata={"note": ""}).json()["id"]
    odd = _create(team, file, metadata={"a]b[c": "x y&z", "note": "n"}).json()["id"]
    none = _create(team, file).json()["id"]

    def found(**query: str) -> list[str]:
        return [job["id"] for job in team.http.get(ROUTE, params=query).json()["data"]]

    assert found(**{"metadata[note]": ""}) == [empty]
    assert found(**{"metadata[a]b[c]": "x y&z"}) == [odd]
    assert found(metadata="null") == [none]
    assert found(**{"metadata[note]": "n", "metadata[none]": "x"}) == []


def test_nulls_mean_defaults_at_any_depth(team: Team, file: str, base: str) -> None:
    knobs: dict[str, Any] = {"hyperparameters": {"n_epochs": None, "batch_size": 4}}
    job = _create(
        team, file, method={"type": "supervised", "supervised": knobs}, technique={"type": "lora", "r": None}
    ).json()
    assert job["hyperparameters"] == {"n_epochs": "auto", "batch_size": 4, "learning_rate_multiplier": "auto"}
    assert job["technique"]["r"] == 16
    wandb = {"type": "wandb", "wandb": {"project": "p", "tags": None, "name": None}}
    assert _create(team, file, integrations=[wandb]).json()["integrations"][0]["wandb"]["tags"] == []
    _refused(_create(team, file, metadata={"k": None}), 400, "metadata.k", "(null): should be a string.")
    _refused(_create(team, file, surprise=None), 400, "surprise", "Unknown parameter")


def test_a_suffix_is_what_somebody_typed(team: Team, file: str, base: str) -> None:
    assert _create(team, file, suffix="My bot: v1/\u2603").json()["user_provided_suffix"] == "My bot: v1/\u2603"
    name = registry.tuned_name(base=BASE, organization="tunery", suffix="My bot: v1/\u2603")
    assert name.startswith(f"ft:{BASE}:tunery:My-bot-v1:")


def test_a_validation_file(team: Team, file: str, base: str) -> None:
    held_out = _upload(team, LINE.replace("q", "v").encode() * 3)
    job = _create(team, file, validation_file=held_out, early_stopping={"patience": 1}, select="best").json()
    assert (job["validation_file"], job["select"]) == (held_out, "best")
    assert job["early_stopping"] == {"patience": 1, "min_delta": 0.0, "metric": "loss"}
