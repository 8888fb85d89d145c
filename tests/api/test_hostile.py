"""Costly requests: they are refused before they cost anything, and other callers are answered meanwhile."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import hostile_files
import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hostile_bodies import CHAT, JOBS, JSON, members, send_all
from teams import BASE, Team

from api import connections, json_route, middleware
from tunery import processes


def error_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:500]
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize("route", [JOBS, CHAT, "/v1/models", "/v1/uploads", "/v1/webhook_endpoints"])
def test_the_key_is_asked_for_before_a_body_is_parsed(
    route: str, anonymous: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(json_route, "_parse", parse)
    for headers in ({}, {"authorization": "Bearer tnr_wrong"}, {"authorization": "Basic eDp5"}):
        answer = anonymous.post(route, content=b'{"model": ', headers={**JSON, **headers})
        assert error_of(answer, 401)["code"] == "invalid_api_key"


def test_each_route_has_a_limit_of_its_own(team: Team, admin: Team) -> None:
    long = b'{"model": "' + b"x" * 2**20 + b'"}'
    assert "1048576 bytes" in error_of(team.http.post(JOBS, content=long, headers=JSON), 413)["message"]
    assert error_of(team.http.post(CHAT, content=long, headers=JSON), 400)["param"] == "messages"
    longer = b'{"model": "' + b"x" * 2**22 + b'"}'
    for route, by in ((CHAT, team), ("/v1/models", admin)):
        assert "4194304 bytes" in error_of(by.http.post(route, content=longer, headers=JSON), 413)["message"]


def test_a_limit_holds_for_a_body_of_unsaid_length(team: Team) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model": "'
        yield from [b"x" * 2**16] * 32

    assert "1048576 bytes" in error_of(team.http.post(JOBS, content=pieces(), headers=JSON), 413)["message"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (JOBS, members(10_001)),
        (JOBS, b'{"integrations":[' + b"1," * 10_001 + b"1]}"),
        (JOBS, b'{"integrations":' + b"[" * 10_001),
        (CHAT, b'{"messages":[' + b"{}," * 60_000 + b"{}]}"),
        (CHAT, b'{"messages":[' + b"1," * 60_000 + b"1]}"),
        (CHAT, b'{"a":"' + b'\\"' * 9 + b'",' + members(60_000)[1:]),
    ],
)
def test_a_body_has_a_most_of_values(route: str, body: bytes, team: Team) -> None:
    assert "values, the limit" in error_of(team.http.post(route, content=body, headers=JSON), 400)["message"]


@pytest.mark.parametrize(
    "text",
    ['{"a":"' + ",{[" * 20_000 + '"}', '{"a":"' + '\\",' * 20_000 + '"}', '{"a":"' + "\\\\" * 9_999 + '","b":[1,2]}'],
)
def test_what_stands_in_a_string_is_no_value(text: str) -> None:
    assert json.loads(text)
    assert json_route._has_at_most(text, 10)


def test_an_unterminated_string_is_scanned_once() -> None:
    began = time.monotonic()
    json_route._has_at_most('{"a":"' + '\\",' * 2**20, 10)
    assert time.monotonic() - began < 5


def test_one_fault_of_many_is_explained(team: Team) -> None:
    began = time.monotonic()
    assert error_of(team.http.post(JOBS, content=members(9_000), headers=JSON), 400)["code"] == "invalid_value"
    many = b'{"model": "m", "messages": [' + b"1," * 40_000 + b"1]}"
    assert error_of(team.http.post(CHAT, content=many, headers=JSON), 400)["param"] == "messages.0"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("route", [JOBS, CHAT, "/v1/files"])
def test_a_compressed_body_is_refused(route: str, team: Team) -> None:
    for coding in ("gzip", "br", "zstd", "deflate, gzip"):
        answer = team.http.post(route, content=b"\x1f\x8b\x08", headers={**JSON, "content-encoding": coding})
        assert "is compressed" in error_of(answer, 400)["message"]


def test_a_slash_too_many_is_not_redirected(team: Team, anonymous: TestClient) -> None:
    for route in ("/v1/files/", "/v1/fine_tuning/jobs/", "/v1/models/", "/docs/"):
        answer = anonymous.get(route, headers={"host": "evil.example"}, follow_redirects=False)
        assert answer.status_code in (401, 404)
        assert "evil.example" not in str(answer.headers) + answer.text


# --- over a socket ---


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        yield connection


def answer_on(connection: socket.socket) -> str:
    """Everything received until the other side closes."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces).decode()


@pytest.fixture
def strict(app: FastAPI) -> Iterator[str]:
    """The address of the API, served as in production."""
    config = uvicorn.Config(app, port=0, log_level="warning", http="api.connections:Protocol", timeout_keep_alive=1)
    server = uvicorn.Server(config)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(server.run)
        assert processes.wait_until(lambda: server.started, seconds=20, alive=lambda: not running.done(), every=0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True


def test_content_length_with_transfer_encoding_is_refused(strict: str, team: Team) -> None:
    smuggled = b"0\r\n\r\nGET /v1/files HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"POST {JOBS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {team.key}\r\n"
    head += f"Transfer-Encoding: chunked\r\nContent-Length: {len(smuggled)}\r\nConnection: close\r\n\r\n"
    with connected(strict) as connection:
        connection.sendall(head.encode() + smuggled)
        said = answer_on(connection)
    assert said.startswith("HTTP/1.1 400 ")
    assert "contradict each other" in said
    assert said.count("HTTP/1.1 ") == 1


@pytest.mark.parametrize("said_first", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: b"])
def test_a_client_that_never_ends_its_headers_is_let_go(
    said_first: bytes, strict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with connected(strict) as connection:
        connection.sendall(said_first)
        assert answer_on(connection).startswith("HTTP/1.1 408 ")


def test_dribbled_headers_do_not_win_time(strict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    began = time.monotonic()
    with connected(strict) as connection:
        connection.settimeout(0.05)
        connection.sendall(b"GET / HTTP/1.1\r\n")
        while time.monotonic() - began < 20:
            try:
                connection.sendall(b"a: b\r\n")
                if not connection.recv(100) or True:
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began < 10


def test_requests_one_after_the_other_are_not_timed_out(strict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with httpx2.Client(trust_env=False, base_url=strict) as client:
        for _ in range(3):
            assert client.get("/healthz").status_code == 200
            assert not processes.wait_until(lambda: False, seconds=0.4, alive=lambda: True)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_a_body_that_stops_is_answered_and_let_go(
    kind: str, strict: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.5)
    route = JOBS if "json" in kind else "/v1/files"
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {team.key}\r\nContent-Type: {kind}\r\n"
    with connected(strict) as connection:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + (b"{" if "json" in kind else b"--b\r\n"))
        said = answer_on(connection)
    assert said.startswith("HTTP/1.1 408 ")
    assert "request_timeout" in said


def test_a_refused_client_that_sends_nothing_more_is_answered(strict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "DRAIN_IDLE_SECONDS", 0.2)
    with connected(strict) as connection:
        connection.sendall(f"POST {JOBS} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode())
        assert answer_on(connection).startswith("HTTP/1.1 401 ")


def test_a_slow_server_is_not_the_clients_fault(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the time spent waiting for the client counts."""
    from tunery.storage.directory import Directory

    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(middleware, "BODY_RATE", 2**40)
    monkeypatch.setattr("api.multipart.CHUNK", 1)
    store = Directory.writer

    @contextmanager
    def slowly(self: Directory, key: str) -> Iterator[Any]:
        with store(self, key) as writer:
            assert not processes.wait_until(lambda: False, seconds=0.7, alive=lambda: True)
            yield writer

    monkeypatch.setattr(Directory, "writer", slowly)
    line = b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}\n'
    sent = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": line * 12})
    assert sent.status_code == 200


# --- files ---


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in hostile_files.SLOW else ())
        for name, (_, reason) in hostile_files.FILES.items()
        if reason
    ],
)
def test_a_hostile_file_is_refused_with_its_place(name: str, team: Team, anonymous: TestClient) -> None:
    make, reason = hostile_files.FILES[name]
    sent = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", make())})
    error = error_of(sent, 400)
    assert reason in error["message"]
    assert error["param"] == "file"
    assert team.http.get("/v1/files").json()["data"] == []
    assert anonymous.get("/healthz").status_code == 200


# --- other callers ---


@pytest.mark.slow
@pytest.mark.parametrize("keyed", [True, False])
def test_the_service_answers_others_throughout(
    keyed: bool, live: str, team: Team, make_team: Callable[..., Team], base: str
) -> None:
    """Four clients send the corpus; meanwhile another project and /healthz are answered."""
    other = make_team("beta")
    waits: list[float] = []
    with ThreadPoolExecutor(4) as threads:
        sent = send_all(threads, live, team.key if keyed else None)
        with httpx2.Client(base_url=live, trust_env=False, timeout=60) as client:
            while not all(one.done() for one in sent):
                began = time.monotonic()
                assert client.get("/healthz").status_code == 200
                waits.append(time.monotonic() - began)
                listed = client.get(f"/v1/models/{BASE}", headers={"authorization": f"Bearer {other.key}"})
                assert listed.json()["id"] == BASE
    assert {one.result() for one in sent} <= ({400, 413} if keyed else {400, 401})
    assert max(waits) < 5, sorted(waits)[-3:]
