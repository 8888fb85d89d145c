"""Enforces a project's rates and counts its usage around each request to the model server."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from api import rate_headers
from api.capturing import Hearing
from tunery.models import registry
from tunery.models.chosen import describe
from tunery.serving import TEXT_FIELD, Chosen
from tunery.settings import Settings
from tunery.traffic import captures, rates, usage
from tunery.traffic.errors import TooManyOpen
from tunery.traffic.model import Capture
from tunery.traffic.rates import Standing
from tunery.traffic.usage import Tokens

log = logging.getLogger(__name__)

CHARACTERS_A_TOKEN = 4
"""For English text. The estimate is used until the answer's own count is known."""


@dataclass
class Admission:
    """An admitted request to the model server. `end` must be called, at least once."""

    app: FastAPI
    project_id: str
    chosen: Chosen
    standing: Standing
    prompt: int
    """Tokens that its prompt is expected to have."""
    deadline: float
    """In the event loop's time."""
    hearing: Hearing | None = None
    """Where the project keeps its requests to the model."""
    used: Tokens = field(default_factory=Tokens)
    _has_ended: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return rate_headers.of(self.standing)

    def note(self, answered: Mapping[str, Any]) -> None:
        """Takes the token counts of an answer, or of a chunk; where a chunk has none, it is one more token."""
        if self.hearing is not None:
            self.hearing.note(answered)
        if counts := answered.get("usage"):
            self.used = Tokens(counts["prompt_tokens"], counts["completion_tokens"])
        elif answered.get("choices"):
            self.used = Tokens(self.prompt, self.used.completion + 1)

    async def end(self) -> None:
        """Counts the used tokens, also if the caller hangs up, as they were computed."""
        if self._has_ended:
            return
        self._has_ended = True
        try:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self._count_usage)
        finally:
            _open(self.app)[self.project_id] -= 1

    def _count_usage(self) -> None:
        model = self.chosen.tuned or self.chosen.base
        settings: Settings = self.app.state.settings
        with self.app.state.sessions.begin() as session:
            if self.used.total:
                usage.count(session, self.project_id, model.id, self.used)
            charged, used = self.standing.charged, self.used.total
            rates.charge_used(session, settings, self.project_id, charged=charged, used=used)
        if self.hearing is not None:
            self._keep(self.hearing)

    def _keep(self, hearing: Hearing) -> None:
        try:
            if (redacted := hearing.redacted()) is not None:
                with self.app.state.sessions.begin() as session:
                    hearing.store(session, redacted)
        except Exception:  # an answer that is paid for is not lost with its copy
            log.exception("a request to %s was not captured", self.chosen.template.id)


async def admit(app: FastAPI, project_id: str, fields: Mapping[str, Any], *, shown_as: str | None) -> Admission:
    """Finds the model and takes the request from the project's rates. `shown_as`: see `Hearing`.

    Raises ModelNotFound, WrongState, RateLimited, TooManyOpen.
    """
    settings: Settings = app.state.settings
    opened = _open(app)
    if opened[project_id] >= settings.open_requests:
        raise TooManyOpen(limit=settings.open_requests)
    opened[project_id] += 1
    try:
        prompt = _expected_prompt(fields)
        chosen, standing, capture = await run_in_threadpool(_take, app, project_id, fields, prompt)
    except BaseException:
        opened[project_id] -= 1
        raise
    deadline = asyncio.get_running_loop().time() + settings.server_seconds
    # A text to continue is not a conversation, which is what is trained and rated.
    hearing = Hearing(capture, fields, shown_as) if capture is not None and "messages" in fields else None
    return Admission(app, project_id, chosen, standing, prompt, deadline, hearing)


def _open(app: FastAPI) -> Counter[str]:
    opened: Counter[str] = app.state.open_requests
    return opened


def _take(
    app: FastAPI, project_id: str, fields: Mapping[str, Any], prompt: int
) -> tuple[Chosen, Standing, Capture | None]:
    with app.state.sessions.begin() as session:
        chosen = _find(session, project_id, fields["model"])
        expected = prompt + _expected_answer(fields)
        capture = captures.setting(session, project_id, chosen.template.id)
        return chosen, rates.take(session, app.state.settings, project_id, expected), capture


def _expected_prompt(fields: Mapping[str, Any]) -> int:
    texts = [fields[name] for name in ("messages", TEXT_FIELD, "tools") if fields.get(name)]
    return 1 + sum(len(json.dumps(text, ensure_ascii=False)) for text in texts) // CHARACTERS_A_TOKEN


def _expected_answer(fields: Mapping[str, Any]) -> int:
    """The most tokens that are asked for; nothing where no limit is said, or where it is not a number, which the model
    server refuses."""
    most = fields.get("max_completion_tokens") or fields.get("max_tokens") or 0
    answers = fields.get("n") or 1
    return max(0, most * answers) if isinstance(most, int) and isinstance(answers, int) else 0


def _find(session: Session, project_id: str, name: str) -> Chosen:
    """Returns what the server needs to load the model: where its files lie, and their manifest's digest."""
    return describe(session, registry.find_ready(session, project_id, name), project_id)
