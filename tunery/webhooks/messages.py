"""The messages to receivers: OpenAI's events, with the `timestamp` that Standard Webhooks requires."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ssl import SSLContext
from types import MappingProxyType
from typing import Any

from tunery import ids
from tunery.errors import InvalidValue
from tunery.webhooks import posting, signing
from tunery.webhooks.addresses import Network, Resolver, locate, resolve
from tunery.webhooks.errors import AddressRefused
from tunery.webhooks.posting import Answer

JOB_TYPES = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
FILE_TYPES = ("file.processed", "file.failed")
BASELINE_TYPES = (
    "fine_tuning.baseline.succeeded",
    "fine_tuning.baseline.failed",
    "fine_tuning.baseline.cancelled",
)
EVENT_TYPES = JOB_TYPES + FILE_TYPES + BASELINE_TYPES
_AGENT = "Tunery/1.0 (webhooks)"


@dataclass(frozen=True)
class Message:
    """A message to an endpoint. `id` is the `webhook-id` header, the same on every try, to recognise duplicates."""

    id: str
    url: str
    secrets: tuple[str, ...]
    body: bytes


def event_type(outcome: str) -> str:
    """Returns the event of a job's final state: `succeeded` -> `fine_tuning.job.succeeded`."""
    return f"fine_tuning.job.{outcome}"


def file_event_type(outcome: str) -> str:
    """Returns the event of a file whose report is there: `processed` -> `file.processed`."""
    return f"file.{outcome}"


def baseline_event_type(status: str) -> str:
    """Returns the event of a baseline's end: `succeeded` -> `fine_tuning.baseline.succeeded`."""
    return f"fine_tuning.baseline.{status}"


def event_id(own_id: str) -> str:
    """Returns the body's event id, made from the stored event's own, so that it is the same whenever it is built."""
    return ids.WEBHOOK_EVENT + own_id.removeprefix(ids.EVENT).removeprefix(ids.FILE_EVENT).removeprefix(ids.BASELINE)


def encode(
    id: str,
    type: str,
    at: datetime,
    object_id: str,
    *,
    verdicts: Mapping[str, Mapping[str, Any] | None] = MappingProxyType({}),
    scorecard: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> bytes:
    """Returns the body about a job or a file. The same event gives the same bytes on every try.

    `verdicts`: those on the job's model by their names, of which the body has the status and whether the model was
    withheld.
    `scorecard`: the job's, of which the body has the primary metric. `report`: the summary of the file's.
    """
    at = at.astimezone(UTC)
    more: dict[str, Any] = {
        name: {"status": found.get("status"), "withheld": found.get("withheld", False)}
        for name, found in verdicts.items()
        if found
    }
    if scorecard and (found := scorecard.get("metrics", {}).get(scorecard.get("primary"))):
        more["scorecard"] = {"rows": scorecard["rows"], "metric": scorecard["primary"], **found}
    if report is not None:
        more["report"] = dict(report)
    event = {
        "id": id,
        "object": "event",
        "type": type,
        "created_at": int(at.timestamp()),
        "timestamp": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": {"id": object_id} | more,
    }
    return json.dumps(event, separators=(",", ":")).encode()


def send(
    message: Message, allow: Sequence[Network], *, resolver: Resolver = resolve, tls: SSLContext | None = None
) -> Answer:
    """Posts a message, signed for this try. Errors are returned in the answer, never raised.

    Call it outside any transaction: it may take posting.TIMEOUT.
    """
    try:
        target = locate(message.url, allow, resolver)
    except (AddressRefused, InvalidValue) as error:
        return Answer(None, error.message, None, 0.0)
    except OSError:
        return Answer(None, "the receiver's name cannot be resolved", None, 0.0)
    # The time of this try, not of the event, as receivers refuse timestamps older than some minutes.
    signed = signing.headers(message.secrets, message.id, int(time.time()), message.body)
    headers = {"Content-Type": "application/json", "User-Agent": _AGENT, "Connection": "close", **signed}
    return posting.post(target, message.body, headers, tls=tls)
