"""Jobs that real workers run twice."""

import pytest
from workshop import Workshop, training_rows

from tunery.artifacts import reproduction
from tunery.artifacts.reproduction import Pair, Reproduction
from tunery.jobs import rerun
from tunery.keys import auth
from tunery.keys.model import Project


def _again(workshop: Workshop, job_id: str, **changes: object) -> str:
    with workshop.session() as session:
        owner = session.get_one(Project, workshop.project_id)
        _, secret = auth.create_key(session, owner, "test")
        return str(rerun.rerun(session, auth.authenticate(session, secret), job_id, changes).id)


def _compare(workshop: Workshop, job_id: str, tolerance: float = 0.005) -> Reproduction:
    with workshop.session() as session:
        return reproduction.compare(session, workshop.storage, workshop.project_id, job_id, tolerance=tolerance)


def _named(pairs: list[Pair]) -> dict[str, Pair]:
    return {pair.name: pair for pair in pairs}


@pytest.mark.slow
@pytest.mark.timeout(900)  # three jobs
def test_a_rerun_gives_the_same_weights_and_another_seed_does_not(workshop: Workshop) -> None:
    training, valid, test = (
        workshop.file(training_rows(count, first)) for count, first in ((24, 0), (12, 50), (10, 80))
    )
    asked = {"technique": {"type": "lora", "r": 2, "dropout": 0.1}, "learning_rate": 1e-2}
    first = workshop.submit(training, valid, test, **asked)
    workshop.start("io")
    workshop.start("train")
    workshop.until_state(first, "succeeded", seconds=240)
    again, other = _again(workshop, first), _again(workshop, first, seed=2)
    assert _compare(workshop, again).status == "pending"
    for job_id in (again, other):
        workshop.until_state(job_id, "succeeded", seconds=240)

    same = _compare(workshop, again, tolerance=0)
    assert (same.status, same.bitwise, same.rerun_of) == ("reproduced", True, first)
    for pairs in (same.inputs, same.environment, same.weights, same.scores):
        assert [pair for pair in pairs if not pair.equal] == []
    known = _named([*same.inputs, *same.environment])
    for name in ("seed", "training_file", "base", "chat_template", "training rows", "technique", "versions.torch"):
        assert known[name].original is not None, name
    assert known["hardware.device"].original == "cpu"
    assert [pair.name for pair in same.weights] == ["adapter_model.safetensors"]
    assert [(each.name, each.steps, each.compared, each.max_relative_difference) for each in same.losses] == [
        ("train_loss", (12, 12), 12, 0.0),
        ("full_valid_loss", (1, 1), 1, 0.0),
    ]
    assert {"exact", "general"} <= _named(same.scores).keys()

    differs = _compare(workshop, other)
    assert (differs.status, differs.bitwise) == ("differs", False)
    assert [(pair.name, pair.original, pair.rerun) for pair in differs.inputs if not pair.equal] == [("seed", 1, 2)]
    assert (differs.losses[0].max_relative_difference or 0) > 1e-3
