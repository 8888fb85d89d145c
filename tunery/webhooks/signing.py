"""Signatures of the Standard Webhooks specification 1.0.0, version `v1`: HMAC-SHA256 over `{id}.{timestamp}.{body}`."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

PREFIX = "whsec_"


def new_secret() -> str:
    """Returns a new secret: `whsec_` and 32 random bytes in standard base64 with its padding.

    Padding and alphabet matter: one common verifier refuses unpadded text, and with url-safe base64 both common ones
    silently use a wrong key.
    """
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """Returns a signature: `v1,` and base64. `timestamp` is unix seconds; `body` exactly the bytes that are sent."""
    key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return "v1," + base64.b64encode(digest).decode()


def headers(keys: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Returns the three headers. With several secrets, as in a rotation, a receiver needs to know only one of them."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(sign(key, message_id, timestamp, body) for key in keys),
    }


def hint(secret: str) -> str:
    """Returns what people recognise a secret by: `whsec_…` and its last four characters."""
    return f"{PREFIX}…{secret.rstrip('=')[-4:]}"
