"""Captures answered requests for projects that chose to: collected as they pass, redacted before they are stored."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from tunery.traffic import captures
from tunery.traffic.model import Capture

log = logging.getLogger(__name__)
Json = dict[str, Any]
_KEPT = ("messages", "tools")
LONGEST = 250_000
"""Characters, as JSON, of a request and its answer that are captured: with a number in every line, redacting so many
takes this process some four seconds."""


class Hearing:
    """Collects a request's first answer. `shown_as`: the id that the caller sees, if not the answer's."""

    def __init__(self, capture: Capture, fields: Mapping[str, Any], shown_as: str | None) -> None:
        self._capture, self._id = capture, shown_as
        self._request = {name: fields[name] for name in _KEPT if fields.get(name)}
        self._content: list[str] = []
        self._calls: dict[int, Json] = {}
        self._finish_reason: str | None = None

    def note(self, answered: Mapping[str, Any]) -> None:
        """Takes an answer, or a chunk of one."""
        for choice in answered.get("choices", ()):
            if choice["index"] == 0:
                self._id = self._id or answered["id"]
                self._take(choice.get("message") or choice.get("delta") or {})
                self._finish_reason = choice["finish_reason"] or self._finish_reason

    def _take(self, said: Json) -> None:
        self._content.append(said.get("content") or "")
        for place, call in enumerate(said.get("tool_calls") or ()):
            known = self._calls.setdefault(call.get("index", place), {"type": "function", "function": {}})
            known["id"] = call.get("id") or known.get("id")
            for name, text in call["function"].items():
                known["function"][name] = known["function"].get(name, "") + (text or "")

    def redacted(self) -> tuple[Json, Json] | None:
        """Returns the request and the answer without personal data; None for an interrupted answer, or more characters
        than LONGEST."""
        # Imported where something is kept: it takes most of a second, and most APIs keep nothing.
        from tunery.datasets.cleaning.redaction import redact

        if self._id is None or self._finish_reason is None:
            return None
        calls = [self._calls[place] for place in sorted(self._calls)]
        text = "".join(self._content)
        answer: Json = {"role": "assistant", "content": text if text or not calls else None}
        answer |= {"tool_calls": calls} if calls else {}
        if (length := len(json.dumps([self._request, answer], ensure_ascii=False))) > LONGEST:
            log.warning("the request of %s has %d characters with its answer, and is not captured", self._id, length)
            return None
        return redact(self._request), redact(answer)

    def store(self, session: Session, redacted: tuple[Json, Json]) -> None:
        """Stores both, unless the project has stopped capturing meanwhile."""
        capture = captures.setting(session, self._capture.project_id, self._capture.model_id)
        if capture is not None and self._id is not None and self._finish_reason is not None:
            request, answer = redacted
            captures.add(session, capture, self._id, request=request, answer=answer, finish_reason=self._finish_reason)
