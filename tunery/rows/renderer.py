"""The process that renders chat templates: reads requests from a socket and writes texts back, until it closes.

    request   length (8 bytes), then marshal of (digest, source or None, [variables, ...], (time, zone's name), trace)
    replies   kind (1 byte), length (8 bytes), payload; for each text a "T", or one "E" in place of all that follow,
              or a "C" (compiled) where no text was asked for. With `trace` (a bool) a text is that of `tracing`

Requests are marshalled, so that variables keep their Python types. Replies come from a process that ran an untrusted
program, so they are plain UTF-8 and JSON, which are safe to read.
"""

import fcntl
import json
import marshal
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import cached_property, partial
from typing import Any, BinaryIO

from jinja2 import Template, TemplateSyntaxError

from tunery.rows import tracing
from tunery.rows.dialect import MAX_SECONDS, Environment, LimitExceeded

MEMORY_BYTES = 512 * 2**20
CPU_SECONDS = int(MAX_SECONDS) + 1
"""Processor time that a request has at least; at most it has twice as much."""
_FLUSH_BYTES = 2**20
_MAX_REASON = 10_000


class Renderer:
    """Serves one socket. `templates` are compiled once and kept under the digests of their sources."""

    def __init__(self, channel: BinaryIO) -> None:
        self._channel = channel
        self._environment = Environment()
        self._sources: dict[bytes, str] = {}
        self._templates: dict[bytes, Template] = {}
        self._traced: dict[bytes, Template] = {}
        self._armed_for = 0.0

    def serve(self) -> None:
        while len(head := self._channel.read(8)) == 8:
            self._arm()
            for reply in self._answer(self._channel.read(int.from_bytes(head, "big"))):
                self._channel.write(reply)
            self._channel.flush()

    def _arm(self) -> None:
        """Extends the limit of processor time; not at every request, as the system call costs more than a text."""
        used = time.process_time()
        if used + CPU_SECONDS > self._armed_for:
            self._armed_for = used + 2 * CPU_SECONDS
            _limit(resource.RLIMIT_CPU, int(self._armed_for))

    def _answer(self, request: bytes) -> Iterator[bytes]:
        try:
            digest, source, batch, moment, is_trace = _loads(request)
            if source is not None:
                self._templates[digest], self._sources[digest] = self._environment.from_string(source), source
            render = self._tracer(digest) if is_trace else partial(self._environment.render, self._templates[digest])
            now, deadline = _moment(*moment), time.monotonic() + MAX_SECONDS
            if not batch:
                yield _reply(b"C", b"")
            for variables in batch:
                yield _reply(b"T", render(variables, now, deadline).encode("utf-8", "surrogatepass"))
        except MemoryError:
            yield _failure(LimitExceeded(f"the template needs more than {MEMORY_BYTES // 2**20} MiB of memory"))
        except Exception as error:  # noqa: BLE001  a template is a program: it can fail in any way that Python can
            yield _failure(error)

    def _tracer(self, digest: bytes) -> Callable[..., str]:
        tracer = self._tracing_environment
        if digest not in self._traced:
            self._traced[digest] = tracer.from_string(self._sources[digest])
        return partial(tracer.trace, self._traced[digest])

    @cached_property
    def _tracing_environment(self) -> tracing.Environment:
        return tracing.Environment()


def _loads(request: bytes) -> tuple[bytes, str | None, Sequence[dict[str, Any]], tuple[str, float | None, str], bool]:
    return marshal.loads(request)  # type: ignore[no-any-return]  # noqa: S302  it comes from our own parent


def _moment(when: str, offset: float | None, zone: str) -> datetime:
    moment = datetime.fromisoformat(when)
    return moment if offset is None else moment.replace(tzinfo=timezone(timedelta(seconds=offset), zone))


def _reply(kind: bytes, payload: bytes) -> bytes:
    return kind + len(payload).to_bytes(8, "big") + payload


def _failure(error: Exception) -> bytes:
    """Returns the error's class and arguments, from which the parent raises a similar one."""
    arguments: list[Any] = [part for part in error.args if isinstance(part, str)]
    if isinstance(error, TemplateSyntaxError):
        arguments = [error.message, error.lineno]
    elif len(arguments) != len(error.args) or not arguments:
        arguments = [str(error)]
    short = [part[:_MAX_REASON] if isinstance(part, str) else part for part in arguments]
    return _reply(b"E", json.dumps([type(error).__name__, short]).encode())


def _limit(kind: int, value: int) -> None:
    """Sets a soft limit and keeps the hard one, so that the soft one can be raised later."""
    try:
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    except (OSError, ValueError):  # macOS has no limit of address space; or a lower hard limit is set already
        return


def _end_with_parent(lifeline: int) -> None:
    """Makes the kernel end this process by SIGIO when the parent's end of the pipe closes, even in the middle of work.

    Not PDEATHSIG: it follows the thread that spawned us, and threads end before their process does.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        os.read(lifeline, 1)
        os._exit(1)  # it closed before we asked


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _limit(kind, value)
    _end_with_parent(int(sys.argv[2]))
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        Renderer(connection.makefile("rwb", buffering=_FLUSH_BYTES)).serve()  # type: ignore[arg-type]
