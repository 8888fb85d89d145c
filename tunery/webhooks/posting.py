"""Sends a POST to a receiver that may be slow, broken or hostile: one overall deadline, no redirects, no proxies."""

import contextlib
import email.utils
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from tunery.webhooks.addresses import Address, Target

TIMEOUT = 15.0
"""Seconds for one POST, from the first connect to the last byte of the answer."""
MAX_ANSWER = 64 * 1024
MAX_REPLY = 4 * 2**20
_MAX_RETRY_AFTER = 86_400.0
_ADDRESSES = 3


@dataclass(frozen=True)
class Answer:
    """The result of a POST: a status code, or an error in words; never the receiver's text, which is untrusted."""

    status_code: int | None
    error: str | None
    retry_after: float | None
    seconds: float

    @property
    def accepted(self) -> bool:
        return self.status_code is not None and 200 <= self.status_code < 300


@dataclass(frozen=True)
class Reply:
    """A whole answer; `body` is the server's text, at most MAX_REPLY bytes."""

    status_code: int | None
    body: bytes
    error: str | None
    retry_after: float | None
    seconds: float


@lru_cache
def _tls() -> ssl.SSLContext:
    # SSL_CERT_FILE and SSL_CERT_DIR name the roots of a company's own authority.
    return ssl.create_default_context()


def post(
    target: Target,
    body: bytes,
    headers: Mapping[str, str],
    *,
    timeout: float = TIMEOUT,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Sends `body` and returns the result; network errors are not raised."""
    started = time.monotonic()
    try:
        with _sent(target, body, headers, started + timeout, tls) as response:
            if time.monotonic() >= started + timeout:  # a cut within the headers looks like their end
                raise TimeoutError
            # Read the body so that the receiver sees a clean end; capped, as it may be endless. Content and errors in
            # it are ignored: the status is known.
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                response.read(MAX_ANSWER)
            retry_after = parse_retry_after(response.getheader("retry-after"))
            return Answer(response.status, _status_error(response.status), retry_after, time.monotonic() - started)
    except (OSError, http.client.HTTPException, ValueError) as error:
        seconds = time.monotonic() - started
        return Answer(None, _in_words(error, timed_out=seconds >= timeout, timeout=timeout), None, seconds)


def fetch(
    target: Target, body: bytes, headers: Mapping[str, str], *, timeout: float, tls: ssl.SSLContext | None = None
) -> Reply:
    """Sends `body` and returns the answer; network errors are not raised."""
    started = time.monotonic()
    try:
        with _sent(target, body, headers, started + timeout, tls) as response:
            content = response.read(MAX_REPLY + 1)
            seconds = time.monotonic() - started
            if seconds >= timeout:  # a cut connection looks like the end of the body
                raise TimeoutError
            if len(content) > MAX_REPLY:
                raise ValueError("too long")
            retry_after = parse_retry_after(response.getheader("retry-after"))
            return Reply(response.status, content, None, retry_after, seconds)
    except (OSError, http.client.HTTPException, ValueError) as error:
        seconds = time.monotonic() - started
        return Reply(None, b"", _in_words(error, timed_out=seconds >= timeout, timeout=timeout), None, seconds)


@contextlib.contextmanager
def _sent(
    target: Target, body: bytes, headers: Mapping[str, str], deadline: float, tls: ssl.SSLContext | None
) -> Iterator[http.client.HTTPResponse]:
    """Sends a POST and yields the response after its headers have been read."""
    with _connected(target, deadline, tls) as connection:
        connection.request("POST", target.path, body, dict(headers))
        yield connection.getresponse()


def _status_error(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    redirected = " (redirects are not followed: register the new url)" if 300 <= status < 400 else ""
    return f"the receiver answered {status}{redirected}"


@contextlib.contextmanager
def _connected(target: Target, deadline: float, tls: ssl.SSLContext | None) -> Iterator[http.client.HTTPConnection]:
    """Yields a connection to one of the target's addresses. Host header, SNI and certificate are those of its name."""
    with _dial(target, deadline) as plain, _ends_at(deadline, plain):
        if target.secure:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(target.host, target.port)
            connection.sock = (tls or _tls()).wrap_socket(plain, server_hostname=target.host)
        else:
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = plain
        connection.auto_open = 0  # a lost connection must not be reopened by name
        with contextlib.closing(connection):
            yield connection


def _dial(target: Target, deadline: float) -> socket.socket:
    failure: OSError = TimeoutError()
    for address in target.addresses[:_ADDRESSES]:
        try:
            return _open(address, target.port, deadline)
        except OSError as error:
            failure = error
    raise failure


def _open(address: Address, port: int, deadline: float) -> socket.socket:
    return socket.create_connection((str(address), port), timeout=max(deadline - time.monotonic(), 0.001))


@contextlib.contextmanager
def _ends_at(deadline: float, plain: socket.socket) -> Iterator[None]:
    """Cuts the connection at the deadline. A socket's own timeout starts again with every byte that arrives."""
    twin = plain.dup()  # TLS takes the socket's descriptor away from `plain`
    timer = threading.Timer(max(deadline - time.monotonic(), 0), _cut, [twin])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        twin.close()


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _in_words(error: Exception, *, timed_out: bool, timeout: float) -> str:
    if timed_out or isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:200]
    return f"not an HTTP answer ({type(error).__name__})"


def parse_retry_after(value: str | None) -> float | None:
    """Returns the seconds of a Retry-After header (seconds or a date), at most a day; None if missing or invalid."""
    if value is None:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else _seconds_until(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER)


def _seconds_until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
