"""The memory for keys and values: those of running rows, and in the remaining memory those of ended rows and what else
saves time, such as recorded steps.

A row whose prompt begins like another's reuses its keys and values instead of computing them. They belong to one base,
one adapter and one project: with another base or adapter they would differ, and another project could infer from the
response time what was asked.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock

from worker.server.slots import Parts

WORTH = 16
"""The fewest tokens for which copying keys is worthwhile."""


@dataclass(frozen=True, eq=False)
class Owner:
    """The owner of keys and values. Compared by identity, since an adapter that is loaded again is another object."""

    batch: object
    adapter: object
    project_id: str | None

    def is_same(self, other: "Owner") -> bool:
        """Whether rows of both owners compute the same keys; rows without a project share nothing."""
        return (
            self.project_id is not None
            and self.project_id == other.project_id
            and self.batch is other.batch
            and self.adapter is other.adapter
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys and values of an ended row's first tokens."""

    owner: Owner
    ids: list[int]
    parts: Parts
    nbytes: int


class CacheMemory:
    """The memory of all batches, of which running rows, kept rows and loans take at most `limit` bytes. Kept rows, at
    most half of it, and then loans are evicted for running rows, the least recently used first. Safe to share between
    threads.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[Kept] = []
        self._running: dict[object, int] = {}
        self._loans: OrderedDict[object, tuple[int, Callable[[], None]]] = OrderedDict()
        self._lock = RLock()  # what a loan's holder frees may be another loan

    @property
    def nbytes(self) -> int:
        """Bytes that are reserved, kept or lent."""
        with self._lock:
            return self._used()

    def reserve(self, batch: object, nbytes: int, *, must: bool = False) -> bool:
        """Reserves memory for a batch's running rows, for which kept rows and loans are evicted; returns success, which
        `must` makes certain.
        """
        with self._lock:
            others = sum(taken for one, taken in self._running.items() if one is not batch)
            if others + nbytes > self.limit and not must:
                return False
            self._running[batch] = nbytes
            self._evict(self.limit, self.limit)
            return True

    def lend(self, holder: object, nbytes: int, free: Callable[[], None]) -> bool:
        """Lends memory, in place of what the holder had, until it is released or evicted by calling `free`; returns
        whether there is room beside running rows.
        """
        with self._lock:
            self.release(holder)
            if sum(self._running.values()) + nbytes > self.limit:
                return False
            self._evict(self.limit - nbytes, self.limit)
            self._loans[holder] = nbytes, free
            return True

    def use(self, holder: object) -> None:
        """Makes a loan the last to be evicted."""
        with self._lock:
            if holder in self._loans:
                self._loans.move_to_end(holder)

    def release(self, holder: object) -> None:
        """Ends a loan, if there is one."""
        with self._lock:
            self._loans.pop(holder, None)

    def find(self, owner: Owner, ids: Sequence[int]) -> tuple[Parts, int]:
        """Returns kept keys and values of the longest prefix of `ids`, and its length."""
        with self._lock:
            alike = [(common(one.ids, ids), one) for one in self._kept if one.owner.is_same(owner)]
            length, kept = max(alike, key=lambda found: found[0], default=(0, None))
            if kept is None or length < WORTH:
                return [], 0
            self._kept.remove(kept)
            self._kept.append(kept)
            return kept.parts, length

    def keep(self, owner: Owner, ids: list[int], copy: Callable[[], Parts], nbytes: int) -> None:
        """Keeps copies of a row's keys and values, if there is room, and drops those of its prefixes."""
        with self._lock:
            if owner.project_id is None or len(ids) < WORTH:
                return
            for one in [one for one in self._kept if one.owner.is_same(owner)]:
                shared = common(one.ids, ids)
                if shared == len(ids):
                    return
                if shared == len(one.ids):
                    self._kept.remove(one)
            if nbytes > self.limit // 2 or self._used() - self._kept_bytes() + nbytes > self.limit:
                return
            self._evict(self.limit - nbytes, self.limit // 2 - nbytes)
            self._kept.append(Kept(owner, ids, copy(), nbytes))

    def forget(self, gone: object) -> None:
        """Frees the memory of a batch or an adapter that is unloaded."""
        with self._lock:
            self._kept = [one for one in self._kept if gone not in (one.owner.batch, one.owner.adapter)]
            self._running.pop(gone, None)

    def _evict(self, used: int, kept: int) -> None:
        """Evicts kept rows, then loans, until at most `used` bytes are in use, of which at most `kept` are kept."""
        while self._kept and (self._used() > used or self._kept_bytes() > kept):
            del self._kept[0]
        while self._loans and self._used() > used:
            _, (_, free) = self._loans.popitem(last=False)
            free()

    def _used(self) -> int:
        return sum(self._running.values()) + self._kept_bytes() + sum(nbytes for nbytes, _ in self._loans.values())

    def _kept_bytes(self) -> int:
        return sum(one.nbytes for one in self._kept)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared whole, which is much faster than token by token
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
