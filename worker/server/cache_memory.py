"""The memory of keys and values: what running rows take, and in the rest those of rows that have ended.

A row whose prompt begins like another's takes over its keys and values instead of computing them. They belong to one
base, one adapter and one project: others would compute other ones, or learn from the time what somebody else has asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from worker.server.slots import Parts

WORTH = 16
"""The fewest tokens that are worth a copy."""


@dataclass(frozen=True, eq=False)
class Owner:
    """Whose keys and values: compared by identity, since an adapter that is loaded again is another object."""

    batch: object
    adapter: object
    project_id: str | None

    def is_same(self, other: "Owner") -> bool:
        """Whether rows of both compute the same; rows without a project share nothing."""
        return (
            self.project_id is not None
            and self.project_id == other.project_id
            and self.batch is other.batch
            and self.adapter is other.adapter
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys and values of the first tokens of a row that has ended."""

    owner: Owner
    ids: list[int]
    parts: Parts

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.parts)


class CacheMemory:
    """`limit`: bytes for running rows and kept ones, of all batches. Kept ones leave for running ones, the least
    recently used first, and take half of it at most. Safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[Kept] = []
        self._running: dict[object, int] = {}
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are promised or kept."""
        with self._lock:
            return self._used()

    def reserve(self, batch: object, nbytes: int, *, must: bool = False) -> bool:
        """Whether the running rows of a batch may take so many bytes, for which kept ones leave; `must`: always."""
        with self._lock:
            others = sum(taken for one, taken in self._running.items() if one is not batch)
            if others + nbytes > self.limit and not must:
                return False
            self._running[batch] = nbytes
            self._evict(self.limit, self.limit)
            return True

    def find(self, owner: Owner, ids: Sequence[int]) -> tuple[Parts, int]:
        """Keys and values of the most first tokens of `ids`, and how many these are."""
        with self._lock:
            alike = [(common(one.ids, ids), one) for one in self._kept if one.owner.is_same(owner)]
            length, kept = max(alike, key=lambda found: found[0], default=(0, None))
            if kept is None or length < WORTH:
                return [], 0
            self._kept.remove(kept)
            self._kept.append(kept)
            return kept.parts, length

    def keep(self, owner: Owner, ids: list[int], copy: Callable[[], Parts], nbytes: int) -> None:
        """Keeps copies of a row's keys and values, if there is room, in place of those of its beginning."""
        with self._lock:
            if owner.project_id is None or len(ids) < WORTH:
                return
            for one in [one for one in self._kept if one.owner.is_same(owner)]:
                shared = common(one.ids, ids)
                if shared == len(ids):
                    return
                if shared == len(one.ids):
                    self._kept.remove(one)
            if nbytes > self.limit // 2 or sum(self._running.values()) + nbytes > self.limit:
                return
            self._evict(self.limit - nbytes, self.limit // 2 - nbytes)
            self._kept.append(Kept(owner, ids, copy()))

    def forget(self, gone: object) -> None:
        """Frees what belongs to a batch or an adapter that leaves."""
        with self._lock:
            self._kept = [one for one in self._kept if gone not in (one.owner.batch, one.owner.adapter)]
            self._running.pop(gone, None)

    def _evict(self, used: int, kept: int) -> None:
        """Frees kept ones until no more bytes are used, and kept, than that."""
        while self._kept and (self._used() > used or self._kept_bytes() > kept):
            del self._kept[0]

    def _used(self) -> int:
        return sum(self._running.values()) + self._kept_bytes()

    def _kept_bytes(self) -> int:
        return sum(one.nbytes for one in self._kept)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many first tokens are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves are compared whole, which is far quicker than token by token
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
