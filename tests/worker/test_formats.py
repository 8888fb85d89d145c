"""Files of every format and shape, from the check to the job's validation, and whole jobs on tables and plain text."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from backports import zstd
from fastapi.testclient import TestClient
from pyarrow import parquet
from workshop import MODEL_INFO, Workshop, training_rows

from api.main import create_app
from tunery.cli import file_check
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.models.model import Model
from worker.io import validation

SHAPES = Path(__file__).parents[1] / "data/shapes"
PAIRS = {"refused_preference", "refused_preference_lists", "refused_preference_openai", "refused_preference_sharegpt"}
"""Shapes of the method dpo, which other methods refuse."""
Row = dict[str, Any]
QUESTIONS = [{"Frage": f"Was kommt nach {n}?", "Antwort": f"{n + 1}", "answer": "wrong"} for n in range(12)]
TEXTS = [{"text": f"After {n} comes {n + 1}."} for n in range(12)]


def lines(rows: list[Row]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def table(rows: list[Row], separator: str = ",") -> bytes:
    made = io.StringIO(newline="")
    writer = csv.DictWriter(made, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return made.getvalue().encode()


def columns(rows: list[Row]) -> bytes:
    parquet.write_table(pyarrow.Table.from_pylist(rows), made := io.BytesIO())
    return made.getvalue()


def files() -> dict[str, bytes]:
    """Returns each shape as JSON Lines, its rows repeated as a training file has ten, and a table in each format."""
    found = {}
    for path in sorted(SHAPES.glob("*.jsonl")):
        rows = path.read_bytes().splitlines()
        found[path.stem] = b"\n".join(rows[number % len(rows)] for number in range(max(10, len(rows))))
    asked = [{"question": row["Frage"], "answer": row["Antwort"]} for row in QUESTIONS]
    plain = {
        "array": json.dumps(asked).encode(),
        "printed array": json.dumps(asked, indent=1).encode(),
        "csv": table(asked),
        "tsv": table(asked, "\t"),
        "parquet": columns(asked),
        "csv of texts": table(TEXTS),
    }
    packed = {f"{name}.gz": gzip.compress(data) for name, data in plain.items()}
    return found | plain | packed | {"csv.zst": zstd.compress(plain["csv"])}


def test_a_file_has_one_verdict_from_the_check_to_the_job(workshop: Workshop, tmp_path: Path) -> None:
    """A job accepts what the check accepts; what the check refuses, the upload or the job refuses in the same words."""
    with workshop.session() as session:
        session.get_one(Model, workshop.base_id).model_info = MODEL_INFO | {"context_length": 2048}
    other = []
    for name, content in files().items():
        (tmp_path / "rows").write_bytes(content)
        verdict = file_check.judge(tmp_path / "rows", "training")
        method = {"type": "dpo"} if name in PAIRS else {"type": "supervised"}
        job_id = workshop.submit(workshop.file(content), method=method, max_seq_length=2048)
        assert validation.validate_next(workshop.settings, workshop.storage)
        job = workshop.job(job_id)
        said = str(job.error_message) if job.state == "failed" else None
        if (verdict.reason is None) != (said is None) or str(verdict.reason) not in str(said):
            other.append((name, said))
    # The check knows no model, and this one's template does not render tools.
    assert [name for name, said in other if "does not render tools" in str(said)] == ["chat_tools", "sharegpt_tools"]
    assert len(other) == 2, other


def client(workshop: Workshop) -> TestClient:
    with workshop.session() as session:
        key = auth.create_key(session, session.get_one(Project, workshop.project_id), "test")[1]
    return TestClient(create_app(workshop.database.settings), headers={"authorization": f"Bearer {key}"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "given", "mapping"),
    [
        (table(QUESTIONS), {"prompt": "Frage", "completion": "Antwort"}, None),
        (columns(QUESTIONS), {"prompt": "Frage", "completion": "Antwort"}, None),
        (table(TEXTS), None, "plain text"),
        (columns([{"body": row["text"]} for row in TEXTS]), {"text": "body"}, None),
    ],
    ids=["CSV by hand", "Parquet by hand", "CSV of texts", "Parquet of texts by hand"],
)
def test_a_job_trains_on_tables(
    workshop: Workshop, content: bytes, given: dict[str, str] | None, mapping: str | None
) -> None:
    workshop.start("io")
    workshop.start("train")
    api = client(workshop)
    sent = api.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows", content)})
    assert sent.status_code == 200, sent.text
    general = workshop.file(training_rows(4))  # its columns are not the task's
    body = {
        "model": "tiny",
        "training_file": sent.json()["id"],
        "seed": 1,
        "learning_rate": 0.01,
        "max_seq_length": 256,
    }
    asked = {"technique": {"type": "lora", "r": 2}, "method": {"type": "supervised"}, "replay": {"source": general}}
    made = api.post("/v1/fine_tuning/jobs", json=body | asked | ({"columns": given} if given else {}))
    assert made.status_code == 200, made.text
    workshop.until_state(made.json()["id"], "succeeded")
    job = api.get(f"/v1/fine_tuning/jobs/{made.json()['id']}").json()
    model = job["fine_tuned_model"]
    record, preview = (
        json.loads(api.get(f"/v1/models/{model}/artifacts/{name}").content)
        for name in ("training_config.json", "preview.json")
    )
    assert {name: column for name, column in (record["plan"]["columns"] or {}).items() if column} == (given or {})
    assert preview["passed"], preview["checks"]
    learned = "".join(t["text"] or "" for t in preview["rows"][0]["sequences"][0]["tokens"] if t["state"] == "trained")
    assert ("1" in learned, "wrong" in learned) == (True, False)
    if mapping:
        assert mapping in preview["shape"]
