"""Asks the model server to load new adapters before their first request."""

import logging

import httpx2

from tunery import db
from tunery.models import chosen
from tunery.serving import LOAD_ROUTE, Chosen
from tunery.settings import Settings

log = logging.getLogger(__name__)

_SECONDS = 5
"""Request timeout in seconds; short, since the server replies before loading."""


class Announcer:
    """Announces the adapters that became usable since the last look.

    Best effort: adapters not announced, including those that existed at start-up, load at their first request.
    """

    def __init__(self, settings: Settings) -> None:
        self._url = f"{settings.server_url}{LOAD_ROUTE}"
        self._most = settings.vllm_adapters
        self._known: set[str] | None = None

    def look(self) -> bool:
        """Announces adapters not seen before. Always returns False: no work is left."""
        with db.transaction() as session:
            found = {one.template.id: one for one in chosen.newest_adapters(session, self._most)}
        known = set(found) if self._known is None else self._known
        for name in [name for name in reversed(found) if name not in known]:
            self._announce(found[name])
        self._known = known | found.keys()
        return False

    def _announce(self, adapter: Chosen) -> None:
        try:
            body = adapter.model_dump(mode="json")
            httpx2.post(self._url, json=body, timeout=_SECONDS, trust_env=False).raise_for_status()
        except httpx2.HTTPError as error:
            log.info("the model server was not asked to load %s: %r", adapter.template.id, error)
