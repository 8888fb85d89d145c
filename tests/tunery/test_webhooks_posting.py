"""A single POST, to receivers that misbehave in every way."""

import ssl
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address, ip_network

import pytest
import trustme
from receiver import LOOPBACK, Receiver, answer, receiving

from tunery.webhooks import messages, posting
from tunery.webhooks.addresses import Address, locate
from tunery.webhooks.messages import Message
from tunery.webhooks.posting import Answer, parse_retry_after
from tunery.webhooks.signing import new_secret

BODY = b'{"type":"fine_tuning.job.succeeded"}'


def _send(url: str, **options: object) -> Answer:
    return messages.send(Message("wh_1", url, (new_secret(),), BODY), LOOPBACK, **options)  # type: ignore[arg-type]


def _post(url: str, timeout: float) -> Answer:
    return posting.post(locate(url, LOOPBACK), BODY, {}, timeout=timeout)


def test_a_good_receiver(receiver: Receiver) -> None:
    sent = _send(f"{receiver.url}/hook?team=a")

    assert (sent.accepted, sent.status_code, sent.error) == (True, 200, None)
    [received] = receiver.received
    assert (received.path, received.body) == ("/hook?team=a", BODY)
    assert received.headers["content-type"] == "application/json"
    assert received.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert received.headers["user-agent"].startswith("Tunery/")
    assert received.headers["webhook-id"] == "wh_1"


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: "])
def test_a_receiver_that_drips_is_cut_off(receiver: Receiver, start: bytes) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        while not receiver.released.wait(0.02):
            handler.wfile.write(b"a" if start else b"HTTP/1.1 100 Continue\r\n\r\n")

    receiver.behaviours["/hook"] = drip
    sent = _post(f"{receiver.url}/hook", 0.3)

    assert sent.status_code is None
    assert sent.error == "no answer within 0.3 s"


def test_a_receiver_that_hangs_is_cut_off(receiver: Receiver) -> None:
    def hang(handler: BaseHTTPRequestHandler) -> None:
        receiver.released.wait()

    receiver.behaviours["/hook"] = hang
    assert _post(f"{receiver.url}/hook", 0.3).error == "no answer within 0.3 s"


def test_an_endless_answer_is_not_read_to_its_end(receiver: Receiver) -> None:
    sent_bytes = []

    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not receiver.released.is_set():
            sent_bytes.append(handler.wfile.write(b"x" * 65536))

    receiver.behaviours["/hook"] = flood
    sent = _send(f"{receiver.url}/hook")

    assert sent.accepted
    assert sum(sent_bytes) < 64 * 2**20, "what fits into the sockets' buffers, and no more"


def test_a_redirect_is_a_failure(receiver: Receiver) -> None:
    receiver.behaviours["/hook"] = answer(307, Location="/elsewhere")
    sent = _send(f"{receiver.url}/hook")

    assert (sent.accepted, sent.status_code) == (False, 307)
    assert "redirects are not followed" in str(sent.error)
    assert [each.path for each in receiver.received] == ["/hook"]


@pytest.mark.parametrize(
    "said", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 999999999999 no\r\n\r\n", b"\x00" * 70000]
)
def test_what_is_no_http_is_an_error_in_words(receiver: Receiver, said: bytes) -> None:
    def babble(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(said)
        handler.close_connection = True

    receiver.behaviours["/hook"] = babble
    sent = _send(f"{receiver.url}/hook")

    assert sent.status_code is None
    assert sent.error
    assert "SSH" not in sent.error, "a receiver's own words are not repeated to the endpoint's owner"


def test_nobody_there() -> None:
    sent = _send("http://127.0.0.1:1/hook")
    assert (sent.status_code, sent.error) == (None, "Connection refused")


def test_a_refused_address_is_an_answer_not_an_exception() -> None:
    sent = _send("http://127.0.0.2/hook")
    assert sent.status_code is None
    assert "not public" in str(sent.error)


def test_a_name_that_does_not_resolve_is_an_answer() -> None:
    def nothing(host: str, port: int) -> list[Address]:
        raise OSError

    assert _send("https://hooks.example/", resolver=nothing).error == "the receiver's name cannot be resolved"


def test_proxies_of_the_environment_are_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert _send(f"{receiver.url}/hook").accepted


def test_the_second_address_is_tried_when_the_first_is_dead(receiver: Receiver) -> None:
    allow = (*LOOPBACK, ip_network("127.0.0.9/32"))
    target = locate(
        f"http://hooks.example:{receiver.port}/", allow, lambda *_: [ip_address("127.0.0.9"), ip_address("127.0.0.1")]
    )
    assert posting.post(target, BODY, {}).accepted


# TLS: the connection goes to the address; SNI and the certificate have the name.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure_receiver(authority: trustme.CA) -> Iterator[Receiver]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(context)
    with receiving(context) as receiver:
        yield receiver


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def _loopback(host: str, port: int) -> list[Address]:
    return [ip_address("127.0.0.1")]


def test_tls_speaks_to_the_name(secure_receiver: Receiver, trusting: ssl.SSLContext) -> None:
    url = f"https://hooks.example:{secure_receiver.port}/hook"
    sent = _send(url, resolver=_loopback, tls=trusting)

    assert sent.accepted, sent.error
    assert secure_receiver.received[0].headers["host"] == f"hooks.example:{secure_receiver.port}"


def test_a_certificate_of_another_name_is_refused(secure_receiver: Receiver, trusting: ssl.SSLContext) -> None:
    sent = _send(f"https://other.example:{secure_receiver.port}/hook", resolver=_loopback, tls=trusting)

    assert "the certificate is not valid" in str(sent.error)
    assert "other.example" in str(sent.error)
    assert secure_receiver.received == []


def test_an_unknown_authority_is_refused(secure_receiver: Receiver) -> None:
    sent = _send(f"https://hooks.example:{secure_receiver.port}/hook", resolver=_loopback)
    assert "the certificate is not valid" in str(sent.error)


def test_a_tls_receiver_that_drips_is_cut_off(secure_receiver: Receiver, trusting: ssl.SSLContext) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        while not secure_receiver.released.wait(0.02):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    secure_receiver.behaviours["/hook"] = drip
    target = locate(f"https://hooks.example:{secure_receiver.port}/hook", LOOPBACK, _loopback)
    sent = posting.post(target, BODY, {}, timeout=0.5, tls=trusting)

    assert sent.error == "no answer within 0.5 s"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7),
        (" 7 ", 7),
        ("-7", None),
        ("soon", None),
        ("1e9", None),
        ("99999999999999999999", 86_400),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 9015 07:28:00 GMT", 86_400),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header) == seconds


def test_retry_after_a_date_of_tomorrow() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 600))
    assert 590 < (parse_retry_after(date) or 0) <= 600
