"""The waiting line before the one model: first come, first served, and nobody waits in a line that is too long.

All of the back end's work happens on one thread of its own, one token at a time, so the event loop stays free for
/healthz and for clients that leave.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from tunery.errors import Overloaded
from worker.server.answer import Answer
from worker.server.backends.backend import Backend
from worker.server.schemas import ChatRequest

T = TypeVar("T")


class Desk:
    """At most `places` requests wait; further ones get Overloaded at once."""

    def __init__(self, backend: Backend, places: int = 32) -> None:
        self.backend = backend
        self._places = places
        self._waiting = 0
        self._lock = asyncio.Lock()
        # One thread always: torch keeps a team of helper threads for each thread that calls it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @property
    def waiting(self) -> int:
        return self._waiting

    @asynccontextmanager
    async def turn(self) -> AsyncIterator["Turn"]:
        """Waits for its turn and keeps it until the block ends. Raises Overloaded."""
        if self._lock.locked() and self._waiting >= self._places:
            raise Overloaded(waiting=self._waiting)
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        turn = Turn(self)
        try:
            yield turn
        finally:
            turn.end()
            self._lock.release()

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def run_later(self, work: Callable[[], object]) -> None:
        self._thread.submit(work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Turn:
    """One request's time at the desk."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._pieces: Generator[str] | None = None

    async def begin(self, request: ChatRequest) -> Answer:
        """Loads the model and renders the prompt; the answer is to be read from `pieces`."""
        answer = await self._desk.run(lambda: self._desk.backend.answer(request))
        self._pieces = iter(answer)
        return answer

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text, a piece a token, many of them empty."""
        assert self._pieces is not None, "begin comes first"
        pieces = self._pieces
        while (piece := await self._desk.run(lambda: next(pieces, None))) is not None:
            yield piece

    def end(self) -> None:
        """Stops an answer that nobody reads any more.

        Not awaited: this may run in a task that is being cancelled, and the thread does one thing after another
        anyway, so a token that is still being computed comes first and the next request after.
        """
        if self._pieces is not None:
            self._desk.run_later(self._pieces.close)
