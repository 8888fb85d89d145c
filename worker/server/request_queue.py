"""The queue in front of the back end, and the loop that advances all running answers together.

A back end computes a piece of every running answer at once (`Backend.advance`), so answers join and leave between two
pieces. The loop has its own thread; models are loaded and prompts rendered in others, so that an answer that waits for
its model delays no running one. The event loop stays free for /healthz and for clients that disconnect.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from threading import Condition, Thread

from tunery.errors import AnswerTooSlow, Overloaded, TuneryError
from tunery.serving import Chosen
from worker.server.answer import Answer
from worker.server.backends.backend import Backend, Closable, Preloading
from worker.server.meter import Meter
from worker.server.schemas import ChatRequest

log = logging.getLogger(__name__)

_DEVICES = ("cpu", "cuda")
"""The kinds of devices whose passes are measured."""
_LOADERS = 4
"""How many requests load their models and render their prompts at once."""

Piece = str | Exception | None
"""A part of an answer's text, what broke it, or its end."""


class RequestQueue:
    """Answers at most `backend.streams` requests at once; `places` more wait, and others get Overloaded at once.

    `seconds`: the longest time from a request's turn to the end of its answers.
    """

    def __init__(self, backend: Backend, places: int = 32, seconds: float = 600) -> None:
        self.backend = backend
        self.seconds = seconds
        self._places = places
        self._waiting = 0
        self._turns = 0
        self._free = asyncio.Semaphore(backend.streams)
        self._loaders = ThreadPoolExecutor(min(_LOADERS, backend.streams), thread_name_prefix="loader")
        self.meter = Meter(computes_here=backend.device.partition(":")[0] in _DEVICES)
        self.loop = Loop(backend, self.meter)

    @property
    def busy(self) -> bool:
        return self._turns > 0

    @property
    def running(self) -> int:
        return self._turns

    @property
    def waiting(self) -> int:
        return self._waiting

    @asynccontextmanager
    async def turn(self) -> AsyncIterator["Turn"]:
        """Waits for a turn and holds it until the block ends. Raises Overloaded."""
        if self._free.locked() and self._waiting >= self._places:
            raise Overloaded(waiting=self._waiting)
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        self._turns += 1
        turn = Turn(self)
        try:
            yield turn
        finally:
            turn.end()
            self._turns -= 1
            self._free.release()

    async def answer(self, request: ChatRequest) -> Answer:
        """Returns the back end's answer, not started yet."""
        making = asyncio.get_running_loop().run_in_executor(self._loaders, self.backend.answer, request)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(
                partial(self._close_unread, request.chosen)
            )  # what a thread has started goes on, and holds a model
            raise

    def load(self, chosen: Chosen) -> None:
        """Begins to load a model before its first request, if the back end can."""
        if isinstance(self.backend, Preloading):
            self._loaders.submit(_logged, self.backend.load, chosen)

    def _close_unread(self, chosen: Chosen, made: "asyncio.Future[Answer]") -> None:
        """Closes an abandoned answer in the thread that steps, as its batch may have started it."""
        if not made.cancelled() and made.exception() is None:
            self.loop.remove(_Running(made.result(), chosen, 0, asyncio.Queue()))

    def close(self) -> None:
        self.loop.close()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        if isinstance(self.backend, Closable):
            self.backend.close()


def _logged(load: Callable[[Chosen], None], chosen: Chosen) -> None:
    try:
        load(chosen)
    except TuneryError as error:
        log.info("%s is not loaded before its first request: %s", chosen.template.id, error)
    except Exception:  # nobody reads the future's
        log.exception("%s could not be loaded", chosen.template.id)


class Turn:
    """One request's turn: from its place in the queue to the end of its answers."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._until = time.monotonic() + queue.seconds
        self._running: list[_Running] = []
        self._pieces: asyncio.Queue[tuple[_Running, Piece]] = asyncio.Queue()

    async def pieces(self, request: ChatRequest) -> AsyncIterator[tuple[int, Answer, str | None]]:
        """Yields the pieces of the `n` answers as they are computed: the answer's index, the answer, and a part of its
        text, often empty; None at its end.

        The answers are computed in parallel, in at most half of the streams. Raises AnswerTooSlow, errors of loading
        the model, and the error that broke an answer.
        """
        beside, ended = max(1, self._queue.backend.streams // 2), 0
        while ended < request.n:
            while len(self._running) < min(request.n, ended + beside):
                await self._begin(request, len(self._running))
            running, piece = await self._next()
            if isinstance(piece, Exception):
                raise piece
            ended += piece is None
            yield running.index, running.answer, piece

    async def _begin(self, request: ChatRequest, index: int) -> None:
        """Loads the model, renders the prompt and starts the answer with this index."""
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                answer = await self._queue.answer(request.nth(index))
        except TimeoutError:
            raise AnswerTooSlow(seconds=self._queue.seconds) from None
        running = _Running(answer, request.chosen, index, self._pieces)
        self._running.append(running)
        self._queue.loop.add(running)

    async def _next(self) -> "tuple[_Running, Piece]":
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                return await self._pieces.get()
        except TimeoutError:
            raise AnswerTooSlow(seconds=self._queue.seconds) from None

    def end(self) -> None:
        """Stops abandoned answers. Not awaited: this may run in a task that is being cancelled."""
        for running in self._running:
            self._queue.loop.remove(running)


class _Running:
    """An answer in the loop. `pieces`: the turn's queue, in which its pieces are not read yet."""

    def __init__(
        self, answer: Answer, chosen: Chosen, index: int, pieces: "asyncio.Queue[tuple[_Running, Piece]]"
    ) -> None:
        self.answer = answer
        self.chosen = chosen
        self.index = index
        self._pieces = pieces
        self._events = asyncio.get_running_loop()
        self._text: Generator[str] | None = None

    def next(self) -> Piece:
        """Returns the next piece; None at the end, after which, as after an error, none may be read."""
        if self._text is None:
            self._text = iter(self.answer)
        try:
            return next(self._text, None)
        except Exception as error:  # noqa: BLE001  its reader gets it, the other answers go on
            return error

    def hand_over(self, piece: Piece) -> None:
        """Passes a piece to the reader, from any thread."""
        # The reader's event loop closes when the server ends.
        if not self._events.is_closed():
            self._events.call_soon_threadsafe(self._pieces.put_nowait, (self, piece))


class Loop:
    """The thread that advances the running answers, until it is closed."""

    def __init__(self, backend: Backend, meter: Meter) -> None:
        self._backend = backend
        self._meter = meter
        self._running: list[_Running] = []
        self._leaving: list[_Running] = []
        self._changed = Condition()
        self._closed = False
        # Always the same thread: torch keeps a pool of helper threads for each thread that calls it.
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, running: _Running) -> None:
        """Adds an answer at the next step."""
        self._change(lambda: self._running.append(running))

    def remove(self, running: _Running) -> None:
        """Ends an answer after the current step, unless it has ended by itself."""
        self._change(lambda: self._leaving.append(running))

    def close(self) -> None:
        def close() -> None:
            self._closed = True

        self._change(close)

    def _change(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify()

    def _run(self) -> None:
        while (running := self._now_running()) is not None:
            if running:
                self._step(running)

    def _step(self, running: list[_Running]) -> None:
        """Passes each running answer's next piece to its reader, and counts tokens."""
        began, before = time.perf_counter(), _tokens(running)
        for one in self._advance(running):
            piece = one.next()
            if not isinstance(piece, str):
                self._end(one)
            one.hand_over(piece)
        chosen, seconds = [one.chosen for one in running], time.perf_counter() - began
        self._meter.count(chosen, _tokens(running) - before, seconds)

    def _now_running(self) -> list[_Running] | None:
        """Waits for running answers and returns them; None when the loop is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._leaving or self._closed)
            leaving, self._leaving = self._leaving, []
        # Without the lock: the event loop's thread waits for it, and an answer that ends may copy its keys.
        for one in leaving:
            self._end(one)
        with self._changed:
            return None if self._closed else list(self._running)

    def _advance(self, running: list[_Running]) -> list[_Running]:
        """Advances the answers; returns those whose next piece is ready."""
        try:
            ready = self._backend.advance([one.answer for one in running])
        except Exception as error:  # noqa: BLE001  the answer at fault is not known: all readers get the error
            for one in running:
                self._end(one)
                one.hand_over(error)
            return []
        found = {id(answer) for answer in ready}
        return [one for one in running if id(one.answer) in found]

    def _end(self, one: _Running) -> None:
        with self._changed:
            if one in self._running:
                self._running.remove(one)
        try:
            one.answer.close()
        except Exception:  # the thread continues with the other answers
            log.exception("an answer could not be closed")


def _tokens(running: list[_Running]) -> int:
    return sum(one.answer.completion_tokens for one in running)
