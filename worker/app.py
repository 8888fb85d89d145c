"""The Celery app: `celery -A worker.app worker -Q train -P prefork -c 1 -n train@%h`, and `-Q io` likewise.

Celery starts the processes, sends them wake-ups and stops them. The work itself is in the database's rows: a lost,
repeated or late message changes nothing, and without a broker work starts up to a poll interval later.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from billiard.process import current_process
from celery import Celery, signals

from tunery import dispatch, plugins
from tunery.settings import ending_if_wrong, get_settings, make_folders, settings_or_exit
from tunery.storage import open_usable_storage
from worker.poller import Poller
from worker.pollers import start_pollers
from worker.supervisor import devices
from worker.supervisor.devices import Device
from worker.supervisor.drain import Drain

log = logging.getLogger(__name__)

app = Celery("tunery", broker=settings_or_exit().broker_url)
app.conf.update(
    # Acknowledged before the work: a message redelivered after an hour would start a day-long run a second time.
    task_acks_late=False,
    task_reject_on_worker_lost=False,
    # A busy worker holds no message that an idle one could take.
    worker_disable_prefetch=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    result_backend=None,
    accept_content=["json"],
    task_serializer="json",
    task_default_queue=dispatch.IO,
    # The default is four seconds, after which the process is killed, and so are its successors.
    worker_proc_alive_timeout=120,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # Without these timeouts a publish on a dead connection waits forever.
    broker_transport_options={
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
    },
)

DRAIN = Drain()
"""Created before the fork, so that the main process and the slots share it."""


class _Here:
    """What this process serves: queues and devices are set before the fork, pollers are started after it."""

    def __init__(self) -> None:
        self.node = "worker"
        self.queues: list[str] = []
        self.devices: list[Device] = []
        self.pollers: dict[str, list[Poller]] = {}


_HERE = _Here()


def work_on_training() -> None:
    _work(dispatch.TRAIN)


def work_on_io() -> None:
    _work(dispatch.IO)


def _work(queue: str) -> None:
    """Runs the queue's first poller in this thread, so that Celery sees the process as busy, and wakes the others."""
    first, *others = _HERE.pollers[queue]
    for poller in others:
        poller.wake()
    first.work()


@contextmanager
def _or_end(leave: Callable[[str], object]) -> Iterator[None]:
    """Calls `leave` if the block raises: Celery would only log the error and keep a worker that does nothing."""
    try:
        yield
    except Exception as error:
        log.exception("this worker cannot start")
        leave(f"this worker cannot start: {error}")


def _look_around(conf: Any, options: dict[str, Any], **_: object) -> None:
    """Finds devices and loads plugins once, before the fork. Without `-c` there is one slot per GPU, or one in all."""
    settings = get_settings()
    with _or_end(sys.exit), ending_if_wrong():
        plugins.load(settings.plugins, "worker")
        open_usable_storage(settings)
        make_folders(settings, "models_dir", "runs_dir")
        if dispatch.TRAIN in str(options.get("queues") or ""):
            _HERE.devices = devices.found(settings.serve_gpu, settings.io_gpu)
    if not options.get("concurrency"):
        conf.worker_concurrency = len(_HERE.devices) or 1


def _note_queues(sender: str, instance: Any, **_: object) -> None:
    _HERE.node = sender
    _HERE.queues = [name for name in instance.app.amqp.queues.consume_from if name in dispatch.TASKS]


def _start_pollers(**_: object) -> None:
    slot = f"{_HERE.node}/{getattr(current_process(), 'index', 0)}"
    settings = get_settings()
    with _or_end(_end_all):
        _HERE.pollers = {queue: start_pollers(queue, slot, settings, DRAIN, _HERE.devices) for queue in _HERE.queues}


def _end_all(_: str) -> None:
    # Ending only this process is no use: Celery replaces it, or, without a broker, does not notice that it ended.
    os.kill(os.getppid(), signal.SIGTERM)
    os._exit(1)


def _drain(**_: object) -> None:
    DRAIN.begin()


def _wait_for_pollers(**_: object) -> None:
    """Waits for the pollers' own threads, whose runs must be saved; Celery waits for its tasks only."""
    for pollers in _HERE.pollers.values():
        for poller in reversed(pollers):  # the first may save a run for minutes, in which its devices fall silent
            poller.wait()


app.task(name=dispatch.TASKS[dispatch.TRAIN])(work_on_training)
app.task(name=dispatch.TASKS[dispatch.IO])(work_on_io)

signals.celeryd_init.connect(_look_around)
signals.celeryd_after_setup.connect(_note_queues)
signals.worker_process_init.connect(_start_pollers)
signals.worker_shutting_down.connect(_drain)
signals.worker_process_shutdown.connect(_wait_for_pollers)
