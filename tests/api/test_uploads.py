"""Uploads: parts in any order, joined into a file that a worker then checks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cloned_databases import Database
from fastapi import FastAPI
from teams import TRAIN, Team

from tunery.datasets.model import Upload

HALVES = (TRAIN[:70], TRAIN[70:])


def _begin(team: Team, bytes: int = len(TRAIN), purpose: str = "fine-tune") -> str:
    body = {"bytes": bytes, "filename": "t.jsonl", "mime_type": "text/jsonl", "purpose": purpose}
    id: str = team.http.post("/v1/uploads", json=body).json()["id"]
    return id


def _add(team: Team, upload: str, data: bytes) -> Any:
    return team.http.post(f"/v1/uploads/{upload}/parts", files={"data": ("upload", data)})


def _complete(team: Team, upload: str, *parts: str, **more: str) -> Any:
    return team.http.post(f"/v1/uploads/{upload}/complete", json={"part_ids": list(parts), **more})


def _stored(database: Database, below: str = "") -> list[Path]:
    root = Path(database.settings.storage_url.removeprefix("file://")) / below
    return [path for path in root.rglob("*") if path.is_file()]


def _refused(answer: Any, param: str | None, words: str) -> None:
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


def test_a_training_file_waits_for_its_check(team: Team) -> None:
    upload = _begin(team)
    parts = [_add(team, upload, half).json()["id"] for half in HALVES]
    done = _complete(team, upload, *parts).json()
    assert (done["status"], done["file"]["status"], done["file"]["bytes"]) == ("completed", "uploaded", len(TRAIN))


def test_other_files_are_ready_at_once(team: Team) -> None:
    upload = _begin(team, 1, "user_data")
    assert _complete(team, upload, _add(team, upload, b"x").json()["id"]).json()["file"]["status"] == "processed"


def test_what_complete_refuses(team: Team) -> None:
    upload = _begin(team)
    parts = [_add(team, upload, half).json()["id"] for half in HALVES]
    _refused(_complete(team, upload, parts[0]), "part_ids", f"created for {len(TRAIN)} bytes")
    _refused(_complete(team, upload, parts[0], "part_none"), "part_ids", "no part 'part_none'")
    _refused(_complete(team, upload, parts[0], parts[0]), "part_ids", "named twice")
    _refused(_complete(team, upload, *parts, md5="0" * 32), "md5", "have the md5")
    _refused(_complete(team, upload, *parts, md5="xyz"), "md5", "should be an MD5 of 32 hexadecimal digits.")
    assert _complete(team, upload, *parts).status_code == 200
    _refused(_add(team, upload, b"x"), None, "is completed")


def test_completing_it_again_answers_with_the_same_file(team: Team, database: Database) -> None:
    """A client that lost the response repeats the request, at once or while the first one still joins the parts."""
    upload = _begin(team)
    parts = [_add(team, upload, half).json()["id"] for half in HALVES]
    with ThreadPoolExecutor(4) as pool:
        answers = [answer.json() for answer in pool.map(lambda _: _complete(team, upload, *parts), range(4))]
    answers.append(_complete(team, upload, *parts).json())
    assert {answer["status"] for answer in answers} == {"completed"}
    [file] = {answer["file"]["id"] for answer in answers}
    assert [path.name for path in _stored(database, "files")] == [file], "bytes that nobody knows of"
    team.http.delete(f"/v1/files/{file}")
    assert _complete(team, upload, *parts).status_code == 404


def test_an_upload_that_is_over_takes_no_parts(team: Team, database: Database) -> None:
    upload, late = _begin(team), _begin(team)
    assert team.http.post(f"/v1/uploads/{upload}/cancel").json()["status"] == "cancelled"
    _refused(_add(team, upload, b"x"), None, "is cancelled")
    _refused(team.http.post(f"/v1/uploads/{upload}/cancel"), None, "is cancelled")
    with database.sessions.begin() as session:
        row = session.get_one(Upload, late)
        row.expires_at = row.created_at
    _refused(_add(team, late, b"x"), None, "is expired")
    assert _stored(database) == []


def test_a_full_part_fits_whatever_the_form_adds(make_app: Callable[..., FastAPI], team: Team) -> None:
    client = team.on(make_app(max_part_bytes=100)).http
    upload = _begin(team)
    full = client.post(f"/v1/uploads/{upload}/parts", files={"data": ("upload", b"x" * 100)})
    assert full.status_code == 200
    more = client.post(f"/v1/uploads/{upload}/parts", files={"data": ("upload", b"x" * 101)})
    assert more.status_code == 413


def test_too_large_an_upload(make_app: Callable[..., FastAPI], team: Team) -> None:
    client = team.on(make_app(max_upload_bytes=100)).http
    body = {"bytes": 101, "filename": "t.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    answer = client.post("/v1/uploads", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "bytes")
