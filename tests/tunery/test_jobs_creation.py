"""Jobs that a part of the service creates itself, without the API."""

import hashlib
from typing import Any, Literal

import pytest
import rows
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.schemas import jobs
from tunery import spec
from tunery.errors import InvalidValue, Rejected, Unsupported
from tunery.jobs import creation
from tunery.jobs.model import Job, JobEvent
from tunery.jobs.request import JobRequest
from tunery.jobs.states import State
from tunery.keys import auth
from tunery.keys.auth import Caller
from tunery.keys.model import Project
from tunery.models.errors import ModelNotFound
from tunery.planning import advice
from tunery.spec import Evaluation, Float, Hyperparameters, Lora, MethodOptions, Plan, TrainingSpec


@pytest.fixture
def caller(session: Session) -> Caller:
    _, secret = auth.create_key(session, rows.project(session), "test")
    return auth.authenticate(session, secret)


@pytest.fixture
def names(session: Session, caller: Caller) -> dict[str, str]:
    """A base and a training file of the caller's project, as a request names them."""
    owner = session.get_one(Project, caller.project_id)
    return {"model": rows.base(session).id, "training_file": rows.file(session, owner).id}


def test_job_of_a_request(session: Session, caller: Caller, names: dict[str, str]) -> None:
    request = JobRequest(
        **names, technique=Lora(r=4), hyperparameters=Hyperparameters(n_epochs=2), packing=True, priority=-1, seed=7
    )

    job = creation.create(session, caller, request)

    options: dict[str, Any] = {"technique": Lora(r=4), "packing": True, "cut_answers": "limit"}
    expected = TrainingSpec(**options, hyperparameters=Hyperparameters(n_epochs=2), seed=7)
    assert TrainingSpec.model_validate(job.spec) == expected
    assert (job.project_id, job.base_model, job.training_file) == (caller.project_id, *names.values())
    assert (job.state, job.priority, job.key_id) == (State.VALIDATING, -1, caller.key_id)
    assert session.scalars(select(JobEvent.message).where(JobEvent.job_id == job.id)).all() == [
        f"Created fine-tuning job: {job.id}"
    ]


def test_every_auto_is_a_number_in_the_finished_job(session: Session, caller: Caller, names: dict[str, str]) -> None:
    job = creation.create(session, caller, JobRequest.model_validate(names))
    plan = advice.resolve(
        TrainingSpec.model_validate(job.spec), examples=34, model_info=rows.MODEL_INFO, bf16_fits=True
    )
    session.refresh(job)
    job.plan, job.state = plan.model_dump(mode="json"), State.SUCCEEDED.value

    echo = jobs.of(job, organization="tunery", warnings=[], waits_for=None)
    decided = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert echo.hyperparameters.model_dump() == decided
    shown = echo.model_dump(mode="json")
    assert shown["method"]["supervised"]["hyperparameters"] == {**decided, "loss_on": "assistant"}
    assert (echo.technique, echo.learning_rate) == (Lora(), advice.default_learning_rate(64, Lora()))


def test_same_request_twice_makes_two_jobs_unless_a_key_says_otherwise(
    session: Session, caller: Caller, names: dict[str, str]
) -> None:
    request = JobRequest(**names, seed=1)
    made = [creation.create(session, caller, request).id for _ in range(2)]
    keyed = [creation.create(session, caller, request, idempotency_key="k").id for _ in range(2)]
    assert len({*made, *keyed}) == 3
    assert keyed[0] == keyed[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"early_stopping": {"patience": 1}}, "early_stopping"),
        ({"select": "best"}, "select"),
        ({"evaluation": {"task_rows": 8}}, "evaluation.task_rows"),
        ({"validation_file": "file-1", "early_stopping": {"metric": "task"}}, "early_stopping.metric"),
        ({"learning_rate": 1e-4, "hyperparameters": {"learning_rate_multiplier": 2}}, "learning_rate"),
        ({"technique": {"type": "full"}, "optimizer": "paged_adamw_8bit"}, "optimizer"),
        (
            {
                "technique": {"type": "qlora", "use_dora": True},
                "resources": {"gpus": 2, "sharding": "full_shard"},
            },
            "resources.sharding",
        ),
        ({"technique": {"type": "full"}, "export": {"merged": True}}, "export.merged"),
        ({"technique": {"type": "full"}, "export": {"adapter_gguf": True}}, "export.adapter_gguf"),
    ],
)
def test_contradictions_are_refused(
    session: Session, caller: Caller, names: dict[str, str], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidValue) as refused:
        creation.create(session, caller, JobRequest.model_validate(names | fields))
    assert refused.value.param == param
    assert session.scalars(select(Job)).all() == []


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (
            {"hyperparameters": {"learning_rate_multiplier": 1e9}},
            "hyperparameters.learning_rate_multiplier",
            "(1e+09): the learning rate would be 7.3e+06, and should be at most 1. Lower it: the default of lora on "
            "this model is 0.0073, and multipliers are usually 0.2 to 2.",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"learning_rate_multiplier": 5000}}}},
            "method.dpo.hyperparameters.learning_rate_multiplier",
            "(5000): the learning rate would be 1.2, and should be at most 1. Lower it: the default of lora on this "
            "model is 0.00024",
        ),
        (
            {
                "technique": {"type": "full"},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 1e-9}}},
            },
            "method.supervised.hyperparameters.learning_rate_multiplier",
            "(1e-09): the learning rate would be 7.3e-13, and should be at least 1e-12. Raise it: the default of full",
        ),
    ],
)
def test_multiplier_leads_to_a_possible_learning_rate(
    session: Session, caller: Caller, names: dict[str, str], fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(InvalidValue) as refused:
        creation.create(session, caller, JobRequest.model_validate(names | fields))
    assert refused.value.param == param
    assert words in refused.value.message


def test_large_multiplier_with_a_possible_learning_rate_is_accepted(
    session: Session, caller: Caller, names: dict[str, str]
) -> None:
    knobs = {"learning_rate_multiplier": 100}
    job = creation.create(session, caller, JobRequest.model_validate({**names, "hyperparameters": knobs}))
    assert job.spec["hyperparameters"]["learning_rate_multiplier"] == 100


def test_job_that_is_beyond_a_requests_bounds_is_still_read(
    session: Session, caller: Caller, names: dict[str, str]
) -> None:
    """Older releases accepted it."""
    job = creation.create(session, caller, JobRequest.model_validate({**names, "seed": 1}))
    beyond = {"max_grad_norm": 1e-9, "hyperparameters": {"learning_rate_multiplier": 1e9}}
    job.spec = {**job.spec, **beyond, "evaluation": {"every_steps": 10**10, "general": {"items": 10**10}}}

    echo = jobs.of(job, organization="tunery", warnings=[], waits_for=None)

    assert (echo.max_grad_norm, echo.hyperparameters.learning_rate_multiplier) == (1e-9, 1e9)
    assert (echo.evaluation.every_steps, echo.evaluation.general.items) == (10**10, 10**10)


def test_contradictions_come_before_names_that_lead_nowhere(session: Session, caller: Caller) -> None:
    nowhere = {"model": "nowhere", "training_file": "nowhere"}
    twice = {"learning_rate": 1e-4, "hyperparameters": {"learning_rate_multiplier": 2}}
    for fields in ({"select": "best"}, twice):
        with pytest.raises(InvalidValue):
            creation.create(session, caller, JobRequest.model_validate(nowhere | fields))
    with pytest.raises(ModelNotFound):
        creation.create(session, caller, JobRequest.model_validate(nowhere))


def test_request_has_one_digest_in_every_release(session: Session, caller: Caller) -> None:
    """A client may repeat a request during an upgrade of the API, and an Idempotency-Key is compared for as long as its
    job is stored."""
    rows.base(session, "tiny")
    rows.file(session, session.get_one(Project, caller.project_id), id="file-1")
    fields = {"model": "tiny", "training_file": "file-1", "seed": 1, "technique": {"type": "lora", "r": 4}}
    said = b'{"model": "tiny", "seed": 1, "technique": {"r": 4, "type": "lora"}, "training_file": "file-1"}'
    job = creation.create(session, caller, JobRequest.model_validate(fields))
    assert job.request_sha256 == hashlib.sha256(said).hexdigest()


def test_spec_with_two_learning_rates_is_refused() -> None:
    twice = {"seed": 1, "learning_rate": 1e-4, "hyperparameters": {"learning_rate_multiplier": 2}}
    with pytest.raises(InvalidValue, match=r"both set the learning rate\. Send one of them\."):
        TrainingSpec.model_validate(twice)


def test_spec_of_an_older_release_is_read() -> None:
    """It was stored before the options had a class of their own: in another order, and without a technique."""
    stored = {
        "schedule": {"type": "cosine", "warmup_ratio": 0.05, "min_ratio": 0.0},
        "max_seq_length": 2048,
        "packing": False,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 7,
        "early_stopping": None,
        "select": "last",
        "evaluation": {"every_steps": "auto", "test_file": None, "max_new_tokens": 64, "max_rows": 1000},
        "resources": {"gpus": 1},
        "technique": None,
        "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
        "learning_rate": None,
    }
    read = TrainingSpec.model_validate(stored)

    assert read == TrainingSpec(seed=7, evaluation=Evaluation(max_new_tokens=64))  # the default of that release
    written = read.model_dump(mode="json")
    assert {name: _only_of(value, written[name]) for name, value in stored.items()} == stored
    assert written["method"] == {"type": "supervised", "loss_on": "assistant"}


def _only_of(old: Any, new: Any) -> Any:
    """Returns the new value without the options that were added since."""
    return {name: new[name] for name in old} if isinstance(old, dict) else new


class Pairwise(MethodOptions):
    """A method of a plug-in."""

    type: Literal["pairwise"] = "pairwise"
    margin: Float = Field(1.0, gt=0)


@pytest.fixture
def pairwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spec.METHODS, "pairwise", Pairwise)


@pytest.mark.usefixtures("pairwise")
@pytest.mark.parametrize(
    ("fields", "margin", "epochs"),
    [
        ({"method": {"type": "pairwise"}, "hyperparameters": {"n_epochs": 2}}, 1.0, 2),
        ({"method": {"type": "pairwise", "pairwise": {"hyperparameters": {"margin": 0.5, "n_epochs": 3}}}}, 0.5, 3),
        ({"method": {"type": "pairwise", "pairwise": {}}}, 1.0, "auto"),
    ],
)
def test_method_of_a_plug_in_is_stored_with_its_own_options(
    session: Session, caller: Caller, names: dict[str, str], fields: dict[str, Any], margin: float, epochs: Any
) -> None:
    job = creation.create(session, caller, JobRequest.model_validate(names | fields))

    stored = TrainingSpec.model_validate(job.spec)
    assert (stored.method, stored.hyperparameters.n_epochs) == (Pairwise(margin=margin), epochs)
    plan = advice.resolve(stored, examples=10, model_info={"hidden_size": 64}, bf16_fits=True)
    assert Plan.model_validate_json(plan.model_dump_json()).method == Pairwise(margin=margin)
    session.refresh(job)
    echo = jobs.of(job, organization="tunery", warnings=[], waits_for=None).model_dump(mode="json")["method"]
    knobs = {"n_epochs": epochs, "batch_size": "auto", "learning_rate_multiplier": "auto", "margin": margin}
    assert echo == {"type": "pairwise", "pairwise": {"hyperparameters": knobs}}


@pytest.mark.usefixtures("pairwise")
@pytest.mark.parametrize(
    ("method", "param", "words"),
    [
        (
            {"type": "sft"},
            "method.type",
            "Method 'sft' is not supported. Use method.type 'supervised' or 'dpo' or",
        ),
        ({"type": "supervised", "pairwise": {}}, "method.pairwise", "but method.type is 'supervised'"),
        ({"type": "pairwise", "supervised": {}}, "method.supervised", "but method.type is 'pairwise'"),
        ({"type": "pairwise", "pairwise": {"margin": 1}}, "method.pairwise.margin", "Unknown parameter"),
        (
            {"type": "pairwise", "pairwise": {"hyperparameters": {"margin": 0}}},
            "method.pairwise.hyperparameters.margin",
            "should be more than 0",
        ),
        (
            {"type": "pairwise", "pairwise": {"hyperparameters": {"n_epochs": 0}}},
            "method.pairwise.hyperparameters.n_epochs",
            "should be at least 1",
        ),
        (
            {"type": "pairwise", "pairwise": {"hyperparameters": {"beta": 1}}},
            "method.pairwise.hyperparameters.beta",
            "Unknown parameter",
        ),
    ],
)
def test_wrong_methods_are_refused(
    session: Session, caller: Caller, names: dict[str, str], method: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(Rejected) as refused:
        creation.create(session, caller, JobRequest.model_validate(names | {"method": method}))
    assert (refused.value.param, words in refused.value.message) == (param, True), refused.value.message


def test_spec_of_a_method_that_is_gone_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"Method 'pairwise' is not supported\. Use method\.type 'supervised'"):
        TrainingSpec.model_validate({"seed": 1, "method": {"type": "pairwise", "margin": 1.0}})
