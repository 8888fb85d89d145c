"""The Celery app: `celery -A worker.app worker -Q train -P prefork -c 1 -n train@%h`, and `-Q io` likewise.

Celery starts the processes, carries wake-ups to them and stops them. What there is to do stands in the rows, so that a
lost, doubled or late message changes nothing, and no broker at all costs a poll interval.
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
from tunery.settings import get_settings
from tunery.storage import open_storage
from worker.poller import Poller
from worker.pollers import start_pollers
from worker.supervisor import devices
from worker.supervisor.devices import Device
from worker.supervisor.drain import Drain

log = logging.getLogger(__name__)

app = Celery("tunery", broker=get_settings().broker_url)
app.conf.update(
    # Acknowledged before the work: a message that came back after its hour would start a day-long run a second time.
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
    # Four seconds by default, and then the process is killed, and its successors too.
    worker_proc_alive_timeout=120,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # Without them a publish on a dead connection waits forever.
    broker_transport_options={
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
    },
)

DRAIN = Drain()
"""Made before the fork, so that main process and slots share it."""


class _Here:
    """What this process serves: queues and devices are known before the fork, the pollers started after it."""

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
    """Runs the queue's first poller in this thread, so that Celery counts the process as busy, and wakes the others."""
    first, *others = _HERE.pollers[queue]
    for poller in others:
        poller.wake()
    first.work()


@contextmanager
def _or_end(leave: Callable[[str], object]) -> Iterator[None]:
    """Celery writes down what a signal's handler raises and goes on, with a worker that is ready and does nothing."""
    try:
        yield
    except Exception as error:
        log.exception("this worker cannot work")
        leave(f"this worker cannot work: {error}")


def _look_around(conf: Any, options: dict[str, Any], **_: object) -> None:
    """Once, before the fork, for all processes. Without `-c` there are as many slots as GPUs, or one."""
    settings = get_settings()
    with _or_end(sys.exit):
        plugins.load(settings.plugins, "worker")
        open_storage(settings)
        if dispatch.TRAIN in str(options.get("queues") or ""):
            _HERE.devices = devices.found(settings.serve_gpu)
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
    # Ending by itself would do no good: Celery replaces a process that ends, and without a broker it does not notice.
    os.kill(os.getppid(), signal.SIGTERM)
    os._exit(1)


def _drain(**_: object) -> None:
    DRAIN.begin()


def _wait_for_pollers(**_: object) -> None:
    """Celery waits for its tasks; a poller's own thread may be working too, and its run must be saved."""
    for pollers in _HERE.pollers.values():
        for poller in pollers:
            poller.wait()


app.task(name=dispatch.TASKS[dispatch.TRAIN])(work_on_training)
app.task(name=dispatch.TASKS[dispatch.IO])(work_on_io)

signals.celeryd_init.connect(_look_around)
signals.celeryd_after_setup.connect(_note_queues)
signals.worker_process_init.connect(_start_pollers)
signals.worker_shutting_down.connect(_drain)
signals.worker_process_shutdown.connect(_wait_for_pollers)
