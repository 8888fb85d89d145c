"""A baseline from the request to the table: a real worker's turn on a tiny model."""

import json
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from run_folders import chat, lay_out, plan
from workshop import Workshop

from api.schemas.baselines import Baseline
from tunery.spec import Evaluation, General
from worker.io import baselines
from worker.supervisor.drain import Drain
from worker.trainer import run
from worker.trainer.report import Voice
from worker.trainer.wish import Wish

ROUTE = "/v1/fine_tuning/baselines"
EVAL, KNOWN = [chat(i) for i in range(100, 106)], [chat(i) for i in range(12)]


def lines(found: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def ask(client: TestClient, workshop: Workshop, **more: Any) -> Baseline:
    """A baseline, as it is after its worker's turn."""
    body = {"model": workshop.base_id, "eval_file": workshop.file(lines(EVAL)), "max_new_tokens": 4, **more}
    made = client.post(ROUTE, json=body)
    assert made.status_code == 200, made.text
    assert baselines.measure_next(workshop.settings, workshop.storage, Drain())
    return Baseline.model_validate(client.get(f"{ROUTE}/{made.json()['id']}").json(), strict=True)


def test_zero_shot_is_the_base_score_of_a_job(
    client: TestClient, workshop: Workshop, tiny_base: Path, tmp_path: Path
) -> None:
    found = ask(client, workshop, examples_file=workshop.file(lines(KNOWN)), shots=[0, 2], retrieval="nearest")
    assert (found.status, found.error, found.progress) == ("succeeded", None, 1.0)
    assert [(row.way, row.shots, row.rows) for row in found.table] == [
        ("zero_shot", 0, 6),
        ("few_shot", 2, 6),
        ("nearest", 2, 6),
    ]

    asked = plan(evaluation=Evaluation(test_file="file-1", max_new_tokens=4, general=General(items=4, prompts=2)))
    trained = lay_out(tmp_path / "trained", tiny_base, asked, KNOWN, test=EVAL)
    assert run.carry_out(trained, Voice(None), Wish())
    card = json.loads((trained / "out" / "scorecard.json").read_text())
    zero = found.table[0]
    assert zero.metric == card["primary"]
    assert {name: one.score for name, one in zero.metrics.items()} == {
        name: one["base"] for name, one in card["metrics"].items()
    }
    by_job = [json.loads(line)["base"] for line in (trained / "out" / "answers.jsonl").read_text().splitlines()]
    kept = client.get(f"{ROUTE}/{found.id}/answers").text.splitlines()
    assert [json.loads(line)["answer"] for line in kept[:6]] == by_job
