"""Starts the pollers of a worker's process, by the queues that it serves."""

from tunery import dispatch
from tunery.settings import Settings
from tunery.storage import open_storage
from tunery.webhooks import outbox
from worker import caches
from worker.io import baselines, cleaning, conversion, exports, files, imports, reports, scores, validation
from worker.io.announcing import Announcer
from worker.io.sweeper import Sweeper
from worker.poller import Poller
from worker.supervisor.devices import Device
from worker.supervisor.drain import Drain
from worker.supervisor.slot import Slot

_SHOW_SECONDS = 60
_CACHES_SECONDS = 600


def start_pollers(queue: str, slot_name: str, settings: Settings, drain: Drain, found: list[Device]) -> list[Poller]:
    """Starts and returns the pollers of one queue. Call it once in each process, after the fork.

    `found`: the devices that may train.
    """
    pollers = _training(slot_name, settings, drain, found) if queue == dispatch.TRAIN else _io(settings, drain)
    for poller in pollers:
        poller.open()
    return pollers


def _training(slot_name: str, settings: Settings, drain: Drain, found: list[Device]) -> list[Poller]:
    slot = Slot(slot_name, settings, drain, found)

    def show() -> bool:
        slot.show()
        return False

    # In a poller of its own, as the slot's work may take days: a device not shown for an hour counts as gone.
    return [
        Poller("training", slot.look, poll_seconds=settings.poll_seconds, drain=drain),
        Poller("devices", show, poll_seconds=_SHOW_SECONDS, drain=drain, on_call=False, at_stop=slot.withdraw),
        _caches(settings, drain),
    ]


def _caches(settings: Settings, drain: Drain) -> Poller:
    """Returns the poller that removes what this host has cached from deleted files: each host cleans its own disk."""

    def remove() -> bool:
        caches.remove_orphans(settings.models_dir)
        return False

    return Poller("caches", remove, poll_seconds=_CACHES_SECONDS, drain=drain, on_call=False)


def _io(settings: Settings, drain: Drain) -> list[Poller]:
    """Returns a poller for each kind of work that may take long, so that no kind waits for another."""
    storage = open_storage(settings)

    def validate() -> bool:
        return files.process_next(storage) or validation.validate_next(settings, storage)

    def convert() -> bool:
        return conversion.convert_next(settings, storage, drain) or imports.import_next(settings, storage, drain)

    def export() -> bool:
        return exports.export_next(settings, storage, drain) or scores.score_next(settings, storage, drain)

    def report() -> bool:
        return cleaning.clean_next(settings, storage, drain) or reports.report_next(settings, storage, drain)

    def prompt() -> bool:
        return baselines.measure_next(settings, storage, drain)

    def deliver() -> bool:
        return outbox.deliver_due(settings) > 0

    looks = {"validation": validate, "conversion": convert, "exports": export, "reports": report, "baselines": prompt}
    pollers = [Poller(name, look, poll_seconds=settings.poll_seconds, drain=drain) for name, look in looks.items()]
    # Webhook retries come due without a wake-up, so this poller and the sweeper look more often.
    pollers.append(Poller("webhooks", deliver, poll_seconds=settings.sweep_seconds, drain=drain))
    if settings.server_backend == "vllm":
        pollers.append(Poller("adapters", Announcer(settings).look, poll_seconds=settings.poll_seconds, drain=drain))
    sweep = Sweeper(settings, storage).round
    # By the clock alone: it sends wake-ups itself, and would wake itself again and again.
    sweeper = Poller("sweeper", sweep, poll_seconds=settings.sweep_seconds, drain=drain, on_call=False)
    return [*pollers, sweeper, _caches(settings, drain)]
