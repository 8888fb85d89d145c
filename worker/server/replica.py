"""One vLLM server: what it has loaded, and the calls to it.

Everything here runs in one event loop, that of the `Fleet`.
"""

import asyncio
import logging
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import httpx2
from pydantic_core import from_json

from tunery.errors import InvalidValue, Rejected

log = logging.getLogger(__name__)

_ADAPTER = re.compile("[0-9a-f]{64}")
"""An adapter's name on a replica: its manifest's digest. Other names are the operator's own."""
_ALREADY = "already been loaded"
_SECONDS = 30
"""The longest time that a replica may take to send a status line."""
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=64)


class ReplicaLost(Exception):
    """The replica does not answer, or says that it cannot serve."""


class AdapterAbsent(Exception):
    """The replica has no model of that name: it was restarted."""


class CannotServe(Rejected):
    """The serving engine cannot load the adapter ({reason}). Merge it into its base, or train another adapter."""

    code = "cannot_serve"


@dataclass(frozen=True)
class Adapter:
    """An adapter: its `name` on the replicas, the path of its files there, and the names under which a replica may
    serve its base.
    """

    name: str
    path: str
    base: frozenset[str]


@dataclass(frozen=True)
class ServedBase:
    """A base on a replica: its name there, its folder's name, and the most tokens of prompt and answer together."""

    name: str
    folder: str
    length: int | None

    def is_one_of(self, names: frozenset[str]) -> bool:
        return not names.isdisjoint({self.name, self.folder})


class Replica:
    """A vLLM server at `url`, without a path."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self.in_flight = 0
        self.is_up = False
        self.bases: list[ServedBase] = []
        self.adapters: dict[str, Adapter] = {}
        self.refused: dict[str, str] = {}
        """Why it refused to load adapters, by their names."""
        self._loading = asyncio.Lock()
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        timeout = httpx2.Timeout(None, connect=5)
        self._client = httpx2.AsyncClient(
            base_url=url, headers=headers, timeout=timeout, trust_env=False, limits=_LIMITS
        )

    def serves(self, base: frozenset[str]) -> bool:
        """Whether the replica is up and has a base of one of these names."""
        return self.is_up and any(one.is_one_of(base) for one in self.bases)

    def find(self, base: frozenset[str]) -> ServedBase:
        """Returns the base of one of these names, which the replica serves."""
        return next(one for one in self.bases if one.is_one_of(base))

    async def look(self) -> None:
        """Reads what the replica has loaded. After an outage, adapters that it refused are tried again."""
        try:
            answer = await self._client.get("/v1/models", timeout=_SECONDS)
            cards = from_json(answer.raise_for_status().content)["data"]
        except (httpx2.HTTPError, ValueError, KeyError) as error:
            self.lose(error)
            return
        if not self.is_up:
            log.info("the vLLM server %s is up", self.url)
            self.refused.clear()
        self.is_up = True
        own = [card for card in cards if not card.get("parent")]
        self.bases = [
            ServedBase(card["id"], PurePosixPath(card.get("root") or "").name, card.get("max_model_len"))
            for card in own
        ]
        laid = [card for card in cards if card.get("parent") and _ADAPTER.fullmatch(card["id"])]
        self.adapters = {
            card["id"]: self.adapters.get(card["id"]) or Adapter(card["id"], card["root"], frozenset({card["parent"]}))
            for card in laid
        }

    def lose(self, error: Exception) -> None:
        """Marks the replica as down until it answers again."""
        if self.is_up:
            log.warning("the vLLM server %s does not answer: %r", self.url, error)
        self.is_up = False
        self.adapters.clear()

    async def lay(self, adapter: Adapter) -> None:
        """Loads an adapter that the replica lacks. Raises ReplicaLost, CannotServe."""
        async with self._loading:
            if adapter.name in self.adapters:
                return
            if adapter.name in self.refused:
                raise CannotServe(reason=self.refused[adapter.name])
            status, message = await self._post(
                "/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": adapter.path}
            )
            # It is loaded already if an earlier call's answer was lost.
            if status != 200 and _ALREADY not in message:
                self.refused[adapter.name] = message
                log.warning("%s refuses the adapter %s: %s", self.url, adapter.name, message)
                raise CannotServe(reason=message)
            self.adapters[adapter.name] = adapter

    async def remove(self, name: str) -> None:
        """Unloads an adapter, if it is loaded or being loaded. Raises ReplicaLost."""
        async with self._loading:
            if self.adapters.pop(name, None) is not None:
                await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def open(self, body: dict[str, Any]) -> httpx2.Response:
        """Returns a completion's stream, which has to be closed. Raises ReplicaLost, AdapterAbsent, InvalidValue."""
        request = self._client.build_request("POST", "/v1/completions", json=body)
        try:
            async with asyncio.timeout(_SECONDS):  # the status line comes before the first token
                answer = await self._client.send(request, stream=True)
            if answer.status_code == 200:
                return answer
            try:
                message = _message(await answer.aread())
            finally:
                await answer.aclose()
        except (httpx2.HTTPError, TimeoutError) as error:
            self.lose(error)
            raise ReplicaLost from error
        if answer.status_code == 404:
            self.adapters.pop(body["model"], None)
            raise AdapterAbsent
        if answer.status_code == 400:
            raise InvalidValue(reason=message)
        log.warning("%s answered %d: %s", self.url, answer.status_code, message)
        raise ReplicaLost

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, path: str, body: dict[str, str]) -> tuple[int, str]:
        """Returns the status, and the message of an error."""
        try:
            answer = await self._client.post(path, json=body, timeout=120)
        except httpx2.HTTPError as error:
            self.lose(error)
            raise ReplicaLost from error
        return answer.status_code, _message(answer.content)


def _message(body: bytes) -> str:
    """Returns the message in an error's body, without the text that vLLM wraps around its worker's message."""
    try:
        text = str(from_json(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]
    inner = re.search(r"Worker failed with error '(.*)', please check", text, re.DOTALL)
    return (inner[1] if inner else text).rstrip(".")
