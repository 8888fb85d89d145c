"""Jobs that a part of the service creates itself, without the API."""

import hashlib
from typing import Any

import pytest
import rows
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery.errors import InvalidValue
from tunery.jobs import creation
from tunery.jobs.model import Job, JobEvent
from tunery.jobs.request import JobRequest
from tunery.jobs.states import State
from tunery.keys import ring
from tunery.keys.model import Project
from tunery.keys.ring import Caller
from tunery.models.errors import ModelNotFound
from tunery.spec import Hyperparameters, Lora, TrainingSpec


@pytest.fixture
def caller(session: Session) -> Caller:
    _, secret = ring.create_key(session, rows.project(session), "test")
    return ring.authenticate(session, secret)


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

    expected = TrainingSpec(technique=Lora(r=4), hyperparameters=Hyperparameters(n_epochs=2), packing=True, seed=7)
    assert TrainingSpec.model_validate(job.spec) == expected
    assert (job.project_id, job.base_model, job.training_file) == (caller.project_id, *names.values())
    assert (job.state, job.priority, job.key_id) == (State.VALIDATING, -1, caller.key_id)
    assert session.scalars(select(JobEvent.message).where(JobEvent.job_id == job.id)).all() == [
        f"Created fine-tuning job: {job.id}"
    ]


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
        ({"learning_rate": 1e-4, "hyperparameters": {"learning_rate_multiplier": 2}}, "learning_rate"),
    ],
)
def test_contradictions_are_refused(
    session: Session, caller: Caller, names: dict[str, str], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidValue) as refused:
        creation.create(session, caller, JobRequest.model_validate(names | fields))
    assert refused.value.param == param
    assert session.scalars(select(Job)).all() == []


def test_contradictions_come_before_names_that_lead_nowhere(session: Session, caller: Caller) -> None:
    nowhere = {"model": "nowhere", "training_file": "nowhere"}
    twice = {"learning_rate": 1e-4, "hyperparameters": {"learning_rate_multiplier": 2}}
    for fields in ({"select": "best"}, twice):
        with pytest.raises(InvalidValue):
            creation.create(session, caller, JobRequest.model_validate(nowhere | fields))
    with pytest.raises(ModelNotFound):
        creation.create(session, caller, JobRequest.model_validate(nowhere))


def test_request_has_one_digest_in_every_release(session: Session, caller: Caller) -> None:
    """A client repeats a request while the API is replaced, and an Idempotency-Key is compared for as long as its job
    is stored."""
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
    """As it was stored before the options had a class of their own: in another order, and with no technique."""
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
    assert TrainingSpec.model_validate(stored) == TrainingSpec(seed=7)
    assert TrainingSpec(seed=7).model_dump(mode="json") == stored
