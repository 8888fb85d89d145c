"""Wake-ups. The row is the queue and a message is a hint: losing one costs a poll interval, never a job."""

import logging
import os
import threading
from functools import lru_cache
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from tunery.settings import get_settings

log = logging.getLogger(__name__)

TRAIN = "train"
IO = "io"
TASKS = {TRAIN: "tunery.work_on_training", IO: "tunery.work_on_io"}
"""Queue -> the one task that a message on it starts. Messages carry nothing; the task looks at the rows."""

_INFO_KEY = "tunery.nudges"


def nudge_after_commit(session: Session, queue: str) -> None:
    """Wakes a worker of `queue` after this session's transaction commits, and not on rollback."""
    session.info.setdefault(_INFO_KEY, set()).add(queue)


@event.listens_for(Session, "after_commit")
def _publish_nudges(session: Session) -> None:
    for queue in session.info.pop(_INFO_KEY, ()):
        nudge(queue)


@event.listens_for(Session, "after_rollback")
def _forget_nudges(session: Session) -> None:
    session.info.pop(_INFO_KEY, None)


def nudge(queue: str) -> None:
    """Wakes a worker of `queue` in the background: publishing to a dead broker takes seconds."""
    _publisher().flag(queue)


class _Publisher:
    """A background thread that publishes messages; nudges during a publication are merged into one message."""

    def __init__(self) -> None:
        from celery import Celery

        self._celery: Any = Celery("tunery", broker=get_settings().broker_url, set_as_current=False)
        self._celery.conf.broker_transport_options = {"socket_connect_timeout": 2, "socket_timeout": 5}
        self._waiting: set[str] = set()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="tunery-nudge", daemon=True).start()

    def flag(self, queue: str) -> None:
        with self._changed:
            self._waiting.add(queue)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                queue = self._waiting.pop()
            try:
                self._celery.send_task(TASKS[queue], queue=queue, retry=False, ignore_result=True)
            except Exception as error:  # noqa: BLE001  whatever the broker does, workers also poll the rows
                log.warning("no wake-up sent to %s (%s); its workers will poll", queue, type(error).__name__)


@lru_cache
def _publisher() -> _Publisher:
    return _Publisher()


# Threads do not survive a fork: a child must not use the inherited publisher, whose thread does not exist there.
os.register_at_fork(after_in_child=_publisher.cache_clear)
