"""Renders chat templates in processes that can be killed (`renderer`), each with limits of processor time and memory.

A template is a program that came with a model. Its budgets (`dialect`) are checked between operations, but a single
operation may take hours or all memory, and a thread cannot be stopped in it; a process can. Processes are started on
demand, one for each thread that renders concurrently, and are kept for later rows.
"""

import atexit
import builtins
import hashlib
import json
import marshal
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from tunery.errors import Unavailable
from tunery.rows.dialect import MAX_SECONDS, LimitExceeded

WALL_SECONDS = MAX_SECONDS * 1.5
"""Time for one request. More than the renderer's own limit, so that its error can say which budget was exceeded."""
BATCH = 16
"""Renderings in one request, which share the time budget."""
MAX_REPLY_BYTES = 128 * 2**20
_MAX_TEMPLATES = 64
_MAX_IDLE = 4
_PIECE_BYTES = 2**16
_PATHS = [Path(__file__).parents[2], Path(jinja2.__file__).parents[1], Path(markupsafe.__file__).parents[1]]
_START = "import sys; sys.path[:0] = sys.argv.pop().split('\\n'); from tunery.rows.renderer import main; main()"


@dataclass(frozen=True)
class Template:
    """A template that compiles without an error."""

    source: str
    digest: bytes


class Environment:
    """Compiles chat templates and renders them. Safe to share between threads and over a fork."""

    def from_string(self, text: str) -> Template:
        """Compiles a template. Raises jinja2's TemplateError."""
        template = Template(text, hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        _render(template, [], datetime.now())  # noqa: DTZ005  nothing is rendered
        return template

    def render(self, template: Template, variables: dict[str, Any], now: datetime) -> str:
        """Returns the rendered text. Raises jinja2's TemplateError, such as LimitExceeded, any Python error that the
        template causes, or Unavailable if no process can be started."""
        return _render(template, [variables], now)[0]

    def render_all(
        self, template: Template, variables: Sequence[dict[str, Any]], now: datetime, at_once: int = BATCH
    ) -> list[str]:
        """Returns one text for each of `variables`, faster than by calls of `render`. Raises what `render` does, for
        the first that fails."""
        return [text for batch in _batches(variables, at_once) for text in _render(template, batch, now)]

    def trace(
        self, template: Template, variables: Sequence[dict[str, Any]], now: datetime
    ) -> list[list[str | int]] | None:
        """Returns the pieces of each text, as `tracing.Environment.trace` does; None if they cannot be traced. Raises
        Unavailable."""
        try:
            return [json.loads(text) for text in _render(template, variables, now, is_trace=True)]
        except Unavailable:
            raise
        except Exception:  # noqa: BLE001  a template is a program: it can fail in any way that Python can
            return None


def _batches(variables: Sequence[dict[str, Any]], size: int) -> Iterator[Sequence[dict[str, Any]]]:
    for start in range(0, len(variables), size):
        yield variables[start : start + size]


def _render(template: Template, batch: Sequence[dict[str, Any]], now: datetime, *, is_trace: bool = False) -> list[str]:
    for last_try in (False, True):
        with _POOL.process() as process:
            try:
                return process.request(template, batch, now, is_trace=is_trace)
            except _Died as death:
                # One retry in a new process: this one may have been killed because memory was short elsewhere.
                if last_try or death.is_deserved:
                    raise LimitExceeded(death.reason) from None
    raise AssertionError("the second try returns or raises")


class _Died(Exception):
    """A renderer ended, or was killed, during a request."""

    def __init__(self, reason: str, *, is_deserved: bool) -> None:
        self.reason, self.is_deserved = reason, is_deserved


class _Process:
    """One renderer. Used by one thread at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        read_end, self._lifeline = os.pipe()
        descriptors = (theirs.fileno(), read_end)
        try:
            self._popen = subprocess.Popen(
                # Isolated and without site-packages' start-up files: only what is named in _PATHS is imported.
                [sys.executable, "-ISB", "-Xutf8", "-c", _START, *map(str, descriptors), "\n".join(map(str, _PATHS))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                pass_fds=descriptors,
            )
        except BaseException as error:
            self._socket.close()
            os.close(self._lifeline)
            if isinstance(error, OSError):  # no memory or process left, which is not the template's fault
                raise Unavailable(part="The process that renders chat templates") from error
            raise
        finally:
            theirs.close()
            os.close(read_end)
        # Not settimeout, which adds a system call before each piece.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(WALL_SECONDS), 0))
        self._received = b""
        self._templates: set[bytes] = set()
        self.is_usable = True

    @property
    def is_full(self) -> bool:
        """Whether it has compiled so many templates that a new process would take less memory."""
        return len(self._templates) >= _MAX_TEMPLATES

    def request(
        self, template: Template, batch: Sequence[dict[str, Any]], now: datetime, *, is_trace: bool = False
    ) -> list[str]:
        source = None if template.digest in self._templates else template.source
        body = marshal.dumps((template.digest, source, list(batch), _moment(now), is_trace))
        self.is_usable = False  # until the last reply is read: after an exception, part of a reply may still arrive
        deadline = time.monotonic() + WALL_SECONDS
        try:
            self._socket.sendall(len(body).to_bytes(8, "big") + body)
            replies = [self._reply(deadline) for _ in range(max(1, len(batch)))]
        except (TimeoutError, BlockingIOError):
            raise _Died(f"the template runs too long (limit: {WALL_SECONDS:g} s)", is_deserved=True) from None
        except OSError:
            raise self._death() from None
        except _Raised as raised:
            self.is_usable = not isinstance(raised.error, LimitExceeded)
            raise raised.error from None
        self._templates.add(template.digest)
        self.is_usable = True
        return replies

    def _reply(self, deadline: float) -> str:
        head = self._receive(9, deadline)
        size = int.from_bytes(head[1:], "big")
        if size > MAX_REPLY_BYTES:
            raise _Died(f"the template renders a text of more than {MAX_REPLY_BYTES:,} bytes", is_deserved=True)
        payload = self._receive(size, deadline)
        if head[:1] == b"E":
            raise _Raised(_error(payload))
        return payload.decode("utf-8", "surrogatepass")

    def _receive(self, size: int, deadline: float) -> bytes:
        pieces, count = [self._received], len(self._received)
        while count < size:
            if time.monotonic() > deadline:
                raise TimeoutError
            piece = self._socket.recv(_PIECE_BYTES)
            if not piece:
                raise ConnectionResetError
            pieces.append(piece)
            count += len(piece)
        whole = b"".join(pieces)
        self._received = whole[size:]
        return whole[:size]

    def _death(self) -> _Died:
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(1)
        if self._popen.returncode == -signal.SIGXCPU:
            return _Died("the template uses too much CPU time", is_deserved=True)
        return _Died(f"the template ended its process (status {self._popen.returncode})", is_deserved=False)

    def close(self) -> None:
        self._socket.close()
        os.close(self._lifeline)
        self._popen.kill()
        self._popen.wait()

    def forget(self) -> None:
        """Releases a renderer that belongs to the parent of this forked process."""
        self._socket.close()
        os.close(self._lifeline)
        self._popen.returncode = 0  # not our child to wait for


class _Raised(Exception):
    """What the template raised in its process."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _error(payload: bytes) -> Exception:
    """Returns an exception of jinja2's or Python's own by its name; a TemplateRuntimeError for any other."""
    name, arguments = json.loads(payload)
    if name == LimitExceeded.__name__:
        return LimitExceeded(*arguments)
    kind = getattr(jinja2.exceptions, name, None) or getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):
            error: Exception = kind(*arguments)
            if isinstance(error, jinja2.TemplateSyntaxError):
                error.translated = True  # prevents jinja2 from adding the source to the message
            return error
    return jinja2.TemplateRuntimeError(f"{name}: {arguments[0]}")


def _moment(now: datetime) -> tuple[str, float | None, str]:
    offset = now.utcoffset()
    return now.isoformat(), None if offset is None else offset.total_seconds(), now.tzname() or ""


class _Pool:
    """Renderers that wait for work."""

    def __init__(self) -> None:
        self._idle: list[_Process] = []
        self._lock = threading.Lock()

    @contextmanager
    def process(self) -> Iterator[_Process]:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or _Process()
        try:
            yield process
        finally:
            self._take_back(process)

    def _take_back(self, process: _Process) -> None:
        with self._lock:
            keep = process.is_usable and not process.is_full and len(self._idle) < _MAX_IDLE
            if keep:
                self._idle.append(process)
        if not keep:
            process.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()

    def forget(self) -> None:
        """Drops all renderers in a forked child: two processes on one renderer would read each other's texts."""
        self._lock = threading.Lock()  # another thread may have held it
        idle, self._idle = self._idle, []
        for process in idle:
            process.forget()


_POOL = _Pool()
os.register_at_fork(after_in_child=_POOL.forget)
atexit.register(_POOL.close)
