"""Holds bases and adapters in memory, and unloads the least recently used for others."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Protocol, TypeVar


class Resident(Protocol):
    """A model in memory."""

    @property
    def nbytes(self) -> int:
        """The memory that the model itself takes."""

    def leave(self) -> None:
        """Frees the model; called once."""


_PATIENCE_SECONDS = 60
"""Time limit of waiting for memory: a model that is pinned, or used all the time, is never released."""

R = TypeVar("R", bound=Resident)


@dataclass
class _Place:
    name: str
    users: int = 1
    model: Any = None
    error: BaseException | None = None
    bytes: int = 0
    is_loading: bool = field(default=True)


class Residents:
    """Models by their digests: two versions of a name are two models. Safe to share between threads.

    `budget`: bytes that all models may take together, including pinned ones (by their ids). Models in use stay, even
    above it.
    """

    def __init__(self, budget: int, pinned: frozenset[str] = frozenset()) -> None:
        self._budget = budget
        self._pinned = pinned
        self._places: dict[str, _Place] = {}  # the least recently used first
        self._changed = Condition()

    @property
    def names(self) -> list[str]:
        """Ids of the models in memory, the last used at the end."""
        with self._changed:
            return [place.name for place in self._places.values() if not place.is_loading]

    @property
    def nbytes(self) -> int:
        with self._changed:
            return self._used()

    def hold(self, key: str, name: str, bytes: int, load: Callable[[], R], *, waits: bool = False) -> R:
        """Returns the key's model, loaded by the first caller; it stays until it is released as often as it was held.

        `bytes`: its estimated memory. `waits`: waits up to a minute before it is loaded above the budget.
        Raises what `load` raises, for every caller that waits for it.
        """
        with self._changed:
            place = self._places.get(key)
            if place is not None:
                known: R = self._join(key, place)
                return known
            place = self._places[key] = _Place(name, bytes=bytes)
        try:
            self._make_room(key, waits)
            place.model = load()
            place.bytes = place.model.nbytes
        except BaseException as error:
            place.error = error
            with self._changed:
                del self._places[key]
            raise
        finally:
            with self._changed:
                place.is_loading = False
                self._changed.notify_all()
        made: R = place.model
        return made

    def release(self, key: str) -> None:
        with self._changed:
            self._places[key].users -= 1
            self._changed.notify_all()

    def _join(self, key: str, place: _Place) -> Any:
        place.users += 1
        self._changed.wait_for(lambda: not place.is_loading)
        if place.error is not None:
            raise place.error
        self._places[key] = self._places.pop(key)
        return place.model

    def _make_room(self, key: str, waits: bool) -> None:
        """Unloads idle models until `key` fits, or none are left."""
        until = time.monotonic() + (_PATIENCE_SECONDS if waits else 0)
        while True:
            with self._changed:
                if self._used() <= self._budget:
                    return
                idle = [k for k, one in self._places.items() if not one.users and one.name not in self._pinned]
                if not idle:
                    others_end = any(one.users and k != key and not one.is_loading for k, one in self._places.items())
                    if not others_end or time.monotonic() > until:
                        return
                    self._changed.wait(until - time.monotonic())
                    continue
                place = self._places.pop(idle[0])
            place.model.leave()

    def _used(self) -> int:
        return sum(place.bytes for place in self._places.values())
