"""The demo's webhook receiver accepts only events with a valid, recent signature."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook

from tunery.local.receiver import Receiver

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
EVENT = {
    "id": "evt_1",
    "object": "event",
    "type": "fine_tuning.job.succeeded",
    "created_at": 1719168000,
    "data": {"id": "ftjob-1"},
}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        receiver.secret = SECRET
        yield receiver


def _post(receiver: Receiver, *, secret: str = SECRET, at: float | None = None) -> int:
    body = json.dumps(EVENT)
    moment = datetime.fromtimestamp(at or time.time(), UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", moment, body),
    }
    request = urllib.request.Request(receiver.url, body.encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_right_signature_is_taken(receiver: Receiver) -> None:
    assert _post(receiver) == 204
    assert receiver.wait_for("fine_tuning.job.succeeded", "ftjob-1", seconds=5)
    assert not receiver.wait_for("fine_tuning.job.succeeded", "ftjob-2", seconds=0)


@pytest.mark.parametrize(
    "wrong", [{"secret": "whsec_" + base64.b64encode(bytes(32)).decode()}, {"at": time.time() - 3600}]
)
def test_a_wrong_or_old_signature_is_not(receiver: Receiver, wrong: dict[str, object]) -> None:
    assert _post(receiver, **wrong) == 400  # type: ignore[arg-type]
    assert not receiver.wait_for("fine_tuning.job.succeeded", "ftjob-1", seconds=0)
    assert len(receiver.refused) == 1
