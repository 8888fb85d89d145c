"""The vLLM servers behind the model server: each holds every adapter in use, and a request goes to the least busy.

Everything here runs in one event loop.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from tunery.errors import Unavailable
from worker.server.replica import Adapter, AdapterAbsent, CannotServe, Replica, ReplicaLost

log = logging.getLogger(__name__)


class NoReplica(Unavailable):
    """No running vLLM server serves the base '{base}'. Try again in a few seconds, or ask the operator to start one
    with --served-model-name '{base}' and to list it in TUNERY_VLLM_REPLICAS."""

    code = "no_replica"


@dataclass(frozen=True)
class Target:
    """The model of a request: a base, by the names that it may have on a replica, and an adapter on it."""

    id: str
    base: frozenset[str]
    adapter: Adapter | None = None


@dataclass
class _Held:
    adapter: Adapter
    users: int = 0


class Fleet:
    """The replicas and their adapters. `slots`: how many adapters are kept loaded; those in use stay even above it."""

    def __init__(self, replicas: Sequence[Replica], *, slots: int, look_seconds: float = 2.0) -> None:
        self.replicas = tuple(replicas)
        self._slots = slots
        self._look_seconds = look_seconds
        self._held: dict[str, _Held] = {}  # the least recently used first
        self._wake = asyncio.Event()
        self._turn = 0

    def knows(self, adapter: str) -> bool:
        """Whether an adapter's files are known to be intact, as it was loaded before."""
        return adapter in self._held

    async def watch(self) -> None:
        """Checks the replicas until cancelled; one that was restarted gets its adapters again."""
        while True:
            self._wake.clear()
            try:
                await self._look()
                await self._trim()
                await asyncio.gather(*(self._equip(replica) for replica in self.replicas if replica.is_up))
            except Exception:  # the next round must come, whatever a server has answered
                log.exception("the vLLM servers could not be checked")
            try:
                await asyncio.wait_for(self._wake.wait(), self._look_seconds)
            except TimeoutError:
                continue

    async def length(self, target: Target) -> int | None:
        """Returns the most tokens of prompt and answer together. Raises NoReplica."""
        if not self._serving(target):
            await self._look()
        lengths = [one.find(target.base).length for one in self._serving(target)]
        if not lengths:
            raise NoReplica(base=target.id)
        return min((length for length in lengths if length is not None), default=None)

    async def load(self, target: Target) -> None:
        """Has every replica with the base load the target's adapter, as if it had just been used."""
        if not self._serving(target):
            await self._look()
        if target.adapter is not None and self._serving(target):
            await self._hold(target.adapter)
            self._release(target)

    async def open(self, target: Target, body: dict[str, Any]) -> tuple[Replica, httpx2.Response]:
        """Opens a completion's stream; `close` must be called with both. Raises NoReplica, CannotServe, InvalidValue.

        If a replica dies, its request goes to the next one, unless some of its tokens have arrived.
        """
        if target.adapter is not None:
            await self._hold(target.adapter)
        try:
            for replica in self._serving(target):
                if (answer := await self._ask(replica, target, body)) is not None:
                    return replica, answer
            raise NoReplica(base=target.id)
        except BaseException:
            self._release(target)
            raise

    async def close(self, target: Target, replica: Replica, answer: httpx2.Response) -> None:
        """Ends a stream, whether or not it was read to the end."""
        replica.in_flight -= 1
        self._release(target)
        await answer.aclose()

    async def end(self) -> None:
        """Closes the connections."""
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    async def _ask(self, replica: Replica, target: Target, body: dict[str, Any]) -> httpx2.Response | None:
        """Returns the replica's stream; None if the replica is lost."""
        adapter = target.adapter
        model = replica.find(target.base).name if adapter is None else adapter.name
        replica.in_flight += 1
        try:
            for _ in range(2):  # the second time after a restart
                try:
                    if adapter is not None:
                        await replica.lay(adapter)
                    return await replica.open({**body, "model": model})
                except AdapterAbsent:
                    continue
            raise ReplicaLost
        except ReplicaLost:
            replica.in_flight -= 1
            return None
        except BaseException:
            replica.in_flight -= 1
            raise

    def _serving(self, target: Target) -> list[Replica]:
        """Returns the replicas with the base, the least busy first; equally busy ones take turns."""
        found = [replica for replica in self.replicas if replica.serves(target.base)]
        self._turn += 1
        at = self._turn % (len(found) or 1)
        return sorted(found[at:] + found[:at], key=lambda replica: replica.in_flight)

    async def _look(self) -> None:
        await asyncio.gather(*(replica.look() for replica in self.replicas))
        # Adapters loaded by an earlier process: registered here, so that they are unloaded, before those in use.
        loaded = {name: adapter for replica in self.replicas for name, adapter in replica.adapters.items()}
        self._held = {name: _Held(one) for name, one in loaded.items() if name not in self._held} | self._held

    async def _equip(self, replica: Replica) -> None:
        """Loads the adapters that the other replicas have and this one lacks."""
        for held in list(self._held.values()):
            adapter = held.adapter
            if adapter.name in replica.refused or not replica.serves(adapter.base):
                continue
            try:
                await replica.lay(adapter)
            except (ReplicaLost, CannotServe):
                continue  # logged already

    async def _hold(self, adapter: Adapter) -> None:
        held = self._held.pop(adapter.name, None)
        if held is None:
            self._wake.set()  # for the other replicas
        self._held[adapter.name] = held = _Held(adapter, users=0 if held is None else held.users)
        held.users += 1
        await self._trim()

    async def _trim(self) -> None:
        """Unloads the least recently used adapters beyond the slots, unless they are in use."""
        idle = [name for name, one in self._held.items() if not one.users]
        for name in idle[: max(0, len(self._held) - self._slots)]:
            del self._held[name]
            await asyncio.gather(*(self._remove(replica, name) for replica in self.replicas))

    async def _remove(self, replica: Replica, name: str) -> None:
        try:
            await replica.remove(name)
        except ReplicaLost:
            return  # its adapters are read when it is back

    def _release(self, target: Target) -> None:
        if target.adapter is not None and (held := self._held.get(target.adapter.name)) is not None:
            held.users -= 1
            if not held.users and len(self._held) > self._slots:
                self._wake.set()
