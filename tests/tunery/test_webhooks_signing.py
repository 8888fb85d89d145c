"""Signatures, checked with the specification's test vector and the two verifiers that receivers use."""

import base64
import time
from collections.abc import Callable

import openai
import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from tunery.webhooks import signing

CLIENT = openai.OpenAI(api_key="unused")
SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
BODY = (
    b'{"id":"evt_1","object":"event","created_at":1719168000,'
    b'"type":"fine_tuning.job.succeeded","data":{"id":"ftjob-1"}}'
)


def _openai_accepts(secret: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        CLIENT.webhooks.verify_signature(body, headers, secret=secret)
    except openai.InvalidWebhookSignatureError:
        return False
    return True


def _standard_accepts(secret: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        Webhook(secret).verify(body, headers)
    except WebhookVerificationError:
        return False
    return True


Verifier = Callable[[str, dict[str, str], bytes], bool]
VERIFIERS = pytest.mark.parametrize("accepts", [_openai_accepts, _standard_accepts])


def test_the_known_vector() -> None:
    assert signing.sign(SECRET, "msg_test", 1719168000, BODY) == "v1,kdi23uTJiU+mwgWJ/BqpsTxmZV339wNHT0dVvk4FHEM="


@VERIFIERS
def test_any_secret_of_ours_verifies(accepts: Verifier) -> None:
    for _ in range(20):  # only some keys have + and /, or other padding, in base64
        secret = signing.new_secret()
        headers = signing.headers([secret], "wh_1", int(time.time()), BODY)
        assert accepts(secret, headers, BODY)
        assert not accepts(secret, headers, BODY + b" ")
        assert not accepts(secret, headers | {"webhook-id": "wh_2"}, BODY)
        assert not accepts(signing.new_secret(), headers, BODY)


@VERIFIERS
def test_old_messages_are_refused(accepts: Verifier) -> None:
    headers = signing.headers([SECRET], "wh_1", int(time.time()) - 3600, BODY)
    assert not accepts(SECRET, headers, BODY)


@VERIFIERS
def test_two_signatures_satisfy_either_secret(accepts: Verifier) -> None:
    old, new = signing.new_secret(), signing.new_secret()
    headers = signing.headers([new, old], "wh_1", int(time.time()), BODY)
    assert accepts(old, headers, BODY)
    assert accepts(new, headers, BODY)


def test_a_secret_is_32_bytes_in_padded_standard_base64() -> None:
    secrets = {signing.new_secret() for _ in range(50)}
    assert len(secrets) == 50
    for secret in secrets:
        assert secret.startswith("whsec_")
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32


def test_a_hint_shows_four_characters() -> None:
    assert signing.hint(SECRET) == "whsec_…dHh8"
