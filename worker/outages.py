"""Logs what keeps a process from working, such as a database that is down: once when it begins and once when it ends,
however many pollers meet it and however often they try."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tunery.db import UNREACHABLE, reason_of
from tunery.errors import Unavailable

log = logging.getLogger(__name__)


class Outages:
    """The outages of a process, each by its reason, with the kinds of work that wait for its end."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def survived(self, work: str) -> Iterator[None]:
        """Logs an error of the block instead of raising it, as the next try of this kind of work may succeed.

        Only an unexpected error is logged at each try, with its traceback.
        """
        try:
            yield
        except (Unavailable, *UNREACHABLE) as error:
            self._begin(work, reason_of(error))
        except Exception:  # a full disk may have space again
            log.exception("%s was interrupted", work)
        else:
            self._end(work)

    def _begin(self, work: str, reason: str) -> None:
        with self._lock:
            if reason not in self._waiting:
                log.warning("%s waits, and is tried again: %s", work, reason)
            self._waiting.setdefault(reason, set()).add(work)

    def _end(self, work: str) -> None:
        with self._lock:
            for reason in [reason for reason, waiting in self._waiting.items() if work in waiting]:
                self._waiting[reason].discard(work)
                if not self._waiting[reason]:
                    del self._waiting[reason]
                    log.info("%s goes on; it had waited because of: %s", work, reason)


OUTAGES = Outages()
