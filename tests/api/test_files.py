"""Uploading, storing and downloading files."""

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import rows
from cloned_databases import Database
from fastapi import FastAPI
from teams import BASE, LINE, TRAIN, Team

from tunery import processes
from tunery.datasets.model import File
from tunery.keys.model import Project

BOUNDARY = "b0undary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def _field(name: str, value: str) -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


def _file(data: bytes, name: str = "file", filename: str = "t.jsonl") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def _stored(database: Database) -> list[Path]:
    root = Path(database.settings.storage_url.removeprefix("file://"))
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("order", ["field first", "file first"])
def test_any_order_of_the_forms_parts(order: str, team: Team) -> None:
    parts = [_field("purpose", "fine-tune"), _file(TRAIN)]
    body = b"".join(parts if order == "field first" else reversed(parts)) + END
    answer = team.http.post("/v1/files", content=body, headers=FORM)
    assert answer.status_code == 200, answer.text
    assert answer.json()["bytes"] == len(TRAIN)
    assert team.http.get(f"/v1/files/{answer.json()['id']}/content").content == TRAIN


BROKEN: list[tuple[bytes, str]] = [
    (TRAIN + b"{broken\n" + TRAIN, "Line 13"),
    (TRAIN + b"[1]\n", "Line 13"),
    (b"", "Line 1"),
    (TRAIN + b"\xff\n", "Line 13"),
]


@pytest.mark.parametrize("order", ["field first", "file first"])
def test_broken_json_lines(order: str, team: Team, database: Database) -> None:
    for data, words in BROKEN:
        parts = [_field("purpose", "fine-tune"), _file(data)]
        body = b"".join(parts if order == "field first" else reversed(parts)) + END
        answer = team.http.post("/v1/files", content=body, headers=FORM)
        assert answer.status_code == 400
        error = answer.json()["error"]
        start = "Expected file to have JSONL format, where every line is a valid JSON dictionary."
        assert error["message"].startswith(start)
        assert words in error["message"]
        assert error["code"] == "invalid_jsonl"
    assert _stored(database) == []
    assert team.http.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("order", ["field first", "file first"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"name": 7}\n' * 500, "Unexpected file format"),
        (b'{"prompt": "q", "completion": "a", "label": true}\n', "KTO"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}\n' * 3, "wizard"),
    ],
)
def test_rows_that_no_job_can_take_are_refused_on_arrival(
    data: bytes, words: str, order: str, team: Team, database: Database
) -> None:
    parts = [_field("purpose", "fine-tune"), _file(data)]
    body = b"".join(parts if order == "field first" else reversed(parts)) + END
    answer = team.http.post("/v1/files", content=body, headers=FORM)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "no_training_rows", "file")
    assert words in error["message"]
    assert _stored(database) == []


@pytest.mark.parametrize("table", [b"name,city\n" + b"Ann,Oslo\n" * 500, b'{"body": "Once"}\n' * 500])
def test_table_whose_columns_a_job_can_name_is_taken(team: Team, table: bytes) -> None:
    answer = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("t.csv", table)})
    assert answer.status_code == 200, answer.text


def test_rows_that_can_be_trained_make_up_for_bad_ones(team: Team) -> None:
    bad = b'{"messages": [{"role": "wizard", "content": "x"}]}\n'
    answer = team.http.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("t.jsonl", bad * 99 + TRAIN + bad * 500)}
    )
    assert answer.status_code == 200, "its report says which rows are wrong"


@pytest.mark.parametrize("order", ["field first", "file first"])
def test_other_purposes_take_any_bytes(order: str, team: Team) -> None:
    parts = [_field("purpose", "user_data"), _file(b"\x00\xff{")]
    body = b"".join(parts if order == "field first" else reversed(parts)) + END
    answer = team.http.post("/v1/files", content=body, headers=FORM)
    assert answer.status_code == 200
    assert answer.json()["status"] == "processed"


WRONG_FORMS: list[tuple[bytes, str | None, str]] = [
    (_file(TRAIN) + END, "purpose", "Missing required parameter: 'purpose'"),
    (_field("purpose", "fine-tune") + END, "file", "Missing required parameter: 'file'"),
    (_field("purpose", "fun") + _file(TRAIN) + END, "purpose", "'fine-tune'"),
    (_field("purpose", "fine-tune-results") + _file(TRAIN) + END, "purpose", "'fine-tune'"),
    (_field("purpose", "fine-tune") + _file(TRAIN, "data") + END, "data", "Send the file as 'file'"),
    (_field("purpose", "fine-tune") + _file(TRAIN) + _file(TRAIN) + END, "file", "two files"),
    (_field("purpose", "fine-tune") + _field("x", "y") + _file(TRAIN) + END, "x", "Unknown parameter: 'x'"),
    (_field("purpose", "fine-tune") + _file(TRAIN), None, "cut off"),
    (_field("purpose", "batch") + _file(b"{") + _field("purpose", "fine-tune") + END, "purpose", "twice"),
    (b"no form at all", None, "multipart"),
    (
        _field("purpose", "fine-tune")
        + _field("expires_after[anchor]", "created_at")
        + _field("expires_after[seconds]", "60")
        + _file(TRAIN)
        + END,
        "expires_after.seconds",
        "3600",
    ),
    (
        _field("purpose", "fine-tune")
        + _field("expires_after", "1 day")
        + _field("expires_after[seconds]", "3600")
        + _file(TRAIN)
        + END,
        "expires_after",
        "both 'expires_after' and 'expires_after[...]'. Send only the second",
    ),
    (
        _field("purpose", "fine-tune")
        + _field("expires_after[seconds]", "3600")
        + _field("expires_after", "1 day")
        + _file(TRAIN)
        + END,
        "expires_after",
        "both 'expires_after' and 'expires_after[...]'. Send only the second",
    ),
    (
        _field("purpose", "fine-tune")
        + _field("expires_after", '{"anchor": "created_at", "seconds": 3600}')
        + _file(TRAIN)
        + END,
        "expires_after",
        "as form fields of its own: 'expires_after[anchor]' and 'expires_after[seconds]'",
    ),
    (_field("purpose", "f" * 70_000) + _file(TRAIN) + END, "purpose", "longer than"),
]


def test_wrong_forms(team: Team, database: Database) -> None:
    for body, param, words in WRONG_FORMS:
        answer = team.http.post("/v1/files", content=body, headers=FORM)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert words in answer.json()["error"]["message"]
    assert _stored(database) == []


def test_not_a_form(team: Team) -> None:
    answer = team.http.post("/v1/files", json={"purpose": "fine-tune"})
    assert answer.status_code == 400
    assert "multipart/form-data" in answer.json()["error"]["message"]


def test_size_limits(make_app: Callable[..., FastAPI], make_team: Callable[..., Team], database: Database) -> None:
    team = make_team("alpha")
    client = team.on(make_app(max_file_bytes=len(TRAIN))).http
    fits = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN})
    assert fits.status_code == 200
    before = _stored(database)
    for data in (TRAIN + b"\n", TRAIN + b"\n" * 3 * 2**20):  # found while streaming; known from the Content-Length
        answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": data})
        assert answer.status_code == 413
        assert answer.json()["error"]["param"] == "file"
        assert "POST /v1/uploads" in answer.json()["error"]["message"]
    assert _stored(database) == before


def test_a_large_file_streams_in_constant_memory(live: str, team: Team) -> None:
    """96 MiB pass through a real socket: the process, client included, grows by less than half of that."""
    row = ('{"messages":[' + LINE[13:-3] + "]," + '"note":"' + "x" * 1000 + '"}\n').encode()
    block = row * (2**20 // len(row))

    def body() -> Iterator[bytes]:
        yield _field("purpose", "fine-tune") + _file(b"")[:-2]
        for _ in range(96):
            yield block
        yield b"\r\n" + END

    headers = {**FORM, "authorization": f"Bearer {team.key}"}
    before = _resident()
    with httpx2.Client(trust_env=False, timeout=60) as client:
        answer = client.post(f"{live}/v1/files", content=body(), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["bytes"] == 96 * len(block)
    assert _resident() - before < 48 * 2**20


def test_an_upload_that_breaks_off_leaves_nothing(live: str, team: Team, database: Database) -> None:
    host, port = live.removeprefix("http://").split(":")
    storage = Path(database.settings.storage_url.removeprefix("file://"))
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {team.key}\r\nContent-Length: 99999999\r\n"
    with socket.create_connection((host, int(port))) as sender:
        sender.sendall(f"{head}Content-Type: {FORM['content-type']}\r\n\r\n".encode())
        sender.sendall(_field("purpose", "fine-tune") + _file(TRAIN * 2000)[:-2])
        assert processes.wait_until(
            lambda: any((storage / ".tmp").iterdir()), seconds=20, every=0.01, alive=lambda: True
        )
    assert processes.wait_until(lambda: not _stored(database), seconds=20, every=0.01, alive=lambda: True)
    assert team.http.get("/v1/files").json()["data"] == []


def test_a_download_holds_no_connection(live: str, team: Team, app: FastAPI) -> None:
    """The request's transaction ends before its stream begins."""
    file = team.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": b"x" * 2**24}).json()["id"]
    headers = {"authorization": f"Bearer {team.key}"}
    with httpx2.stream("GET", f"{live}/v1/files/{file}/content", headers=headers, trust_env=False) as answer:
        pieces = answer.iter_raw(1024)
        next(pieces)
        assert app.state.sessions.kw["bind"].pool.checkedout() == 0
        assert sum(len(piece) for piece in pieces) == 2**24 - 1024


def _resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_a_file_in_use_stays(team: Team, base: str) -> None:
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": TRAIN}).json()["id"]
    job = team.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file}).json()["id"]
    refused = team.http.delete(f"/v1/files/{file}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "file_in_use")
    assert job in refused.json()["error"]["message"]
    team.http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    assert team.http.delete(f"/v1/files/{file}").json() == {"id": file, "object": "file", "deleted": True}
    again = team.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file})
    assert (again.status_code, again.json()["error"]["param"]) == (404, "training_file")


def test_an_expired_file_is_gone(team: Team, database: Database) -> None:
    with database.sessions.begin() as session:
        file = rows.file(session, session.get_one(Project, team.id), expires_at=rows.LONG_AGO).id
    assert team.http.get(f"/v1/files/{file}").status_code == 404
    assert team.http.get("/v1/files").json()["data"] == []


def test_names_are_data(team: Team, database: Database) -> None:
    """Whatever a file is called, the service chooses its key, and the headers make browsers save it, never show it."""
    name = '../../../etc/"<script>\u2603.jsonl'
    answer = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, TRAIN)})
    file = answer.json()
    with database.sessions() as session:
        assert session.get_one(File, file["id"]).key == f"files/{file['id']}"
    content = team.http.get(f"/v1/files/{file['id']}/content")
    assert content.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
    assert "/" not in content.headers["content-disposition"].removeprefix("attachment; filename*=UTF-8''")
    assert content.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("setting", "accept", "coded"),
    [("base64", "*/*", True), ("plain", "application/binary", False), ("auto", "application/binary", True)],
)
def test_result_files_can_be_forced(
    setting: str, accept: str, coded: bool, make_app: Callable[..., FastAPI], team: Team, database: Database
) -> None:
    app = make_app(result_files=setting)
    app.state.storage.put("files/results", b"step\n1\n")
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        file = rows.file(session, owner, purpose="fine-tune-results", key="files/results").id
    content = team.on(app).http.get(f"/v1/files/{file}/content", headers={"accept": accept}).content
    assert content == (b"c3RlcAoxCg==" if coded else b"step\n1\n")


def test_bytes_that_are_missing_from_storage(team: Team, database: Database) -> None:
    with database.sessions.begin() as session:
        file = rows.file(session, session.get_one(Project, team.id)).id
    assert team.http.get(f"/v1/files/{file}/content").status_code == 500
