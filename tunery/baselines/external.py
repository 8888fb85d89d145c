"""External OpenAI-compatible endpoints: checks their addresses, encrypts their keys, and sends a question."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

from tunery.baselines.errors import EndpointRefused
from tunery.baselines.order import External
from tunery.errors import InvalidValue, Unsupported
from tunery.settings import Network, Settings
from tunery.webhooks import addresses, posting
from tunery.webhooks.addresses import Resolver, Target, resolve
from tunery.webhooks.errors import AddressRefused
from tunery.webhooks.posting import Reply

TIMEOUT = 60.0
"""Seconds for one answer."""
TRIES = 3
MOST_WAIT = 20.0
"""Maximum seconds between two tries, whatever the endpoint asks for."""
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_AGENT = "Tunery/1.0 (baselines)"
_WHY: Mapping[int, str] = {
    400: "it rejects temperature 0, max_tokens or these messages: choose another model",
    401: "check external.api_key",
    403: "the key may not use this model: check external.api_key and external.model",
    404: "check external.base_url, to which /chat/completions is added, and external.model",
    429: "its rate limit is reached: lower max_rows, or try again later",
}


@dataclass(frozen=True)
class Said:
    """An answer. Tokens are as counted by the endpoint, None if it does not count them."""

    text: str
    prompt_tokens: int | None
    answer_tokens: int | None
    seconds: float


class NoAnswer(Exception):
    """The endpoint cannot be used: its text says why."""


def check(external: External, settings: Settings, resolver: Resolver = resolve) -> None:
    """Checks that an endpoint may be used. Raises Unsupported, InvalidValue, EndpointRefused."""
    if settings.external_secret is None:
        instead = "Ask the operator to set TUNERY_EXTERNAL_SECRET, or leave 'external' out."
        raise Unsupported(param="external", what="An external endpoint", instead=instead)
    try:
        addresses.check(external.base_url, settings.external_allow, resolver)
    except (AddressRefused, InvalidValue) as error:
        raise _ours(error) from None


def _ours(error: AddressRefused | InvalidValue) -> EndpointRefused | InvalidValue:
    """Returns the error of a refused address, reworded for endpoints."""
    param = "external.base_url"
    if isinstance(error, AddressRefused):
        return EndpointRefused(param=param, **error.fields)
    return InvalidValue(param=param, reason=f"An external endpoint's base_url {error.fields['fault']}.")


# --- the key ------------------------------------------------------------------------------------------------------


def seal(key: SecretStr, secret: SecretStr) -> str:
    """Encrypts the key for storage."""
    return _cipher(secret).encrypt(key.get_secret_value().encode()).decode()


def unseal(sealed: str, secret: SecretStr) -> SecretStr:
    """Decrypts the key. Raises NoAnswer if the operator's secret has changed."""
    try:
        return SecretStr(_cipher(secret).decrypt(sealed.encode()).decode())
    except InvalidToken:
        raise NoAnswer(
            "The endpoint's key cannot be decrypted, because TUNERY_EXTERNAL_SECRET has changed. Create the baseline "
            "again"
        ) from None


def _cipher(secret: SecretStr) -> Fernet:
    digest = hashlib.sha256(b"tunery external " + secret.get_secret_value().encode()).digest()
    return Fernet(base64.urlsafe_b64encode(digest))


# --- asking -------------------------------------------------------------------------------------------------------


def ask(
    external: External,
    key: SecretStr | None,
    chat: Mapping[str, Any],
    *,
    limit: int,
    allow: Sequence[Network],
    resolver: Resolver = resolve,
    timeout: float = TIMEOUT,
) -> Said:
    """Returns the endpoint's greedy answer to a chat of `messages` and maybe `tools`. Raises NoAnswer.

    Call it outside any transaction: it may take TRIES times `timeout` and MOST_WAIT.
    """
    target = _locate(external, allow, resolver)
    asked = {"model": external.model, "temperature": 0, "max_tokens": limit, **chat}
    headers = {"Content-Type": "application/json", "User-Agent": _AGENT, "Connection": "close"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key.get_secret_value()}"
    for left in reversed(range(TRIES)):
        reply = posting.fetch(target, json.dumps(asked).encode(), headers, timeout=timeout)
        if reply.status_code == 200:
            return _read(reply)
        if not left or reply.status_code not in (None, *_AGAIN):
            break
        time.sleep(min(MOST_WAIT, reply.retry_after or 2.0 ** (TRIES - left)))
    raise NoAnswer(_why(reply))


def _locate(external: External, allow: Sequence[Network], resolver: Resolver) -> Target:
    """Resolves and checks the endpoint again, as its addresses may have changed. Raises NoAnswer."""
    try:
        return addresses.locate(f"{external.base_url.rstrip('/')}/chat/completions", allow, resolver)
    except (AddressRefused, InvalidValue) as error:
        raise NoAnswer(_ours(error).message) from None
    except OSError:
        raise NoAnswer("The endpoint's name cannot be resolved. Correct external.base_url") from None


def _why(reply: Reply) -> str:
    # Never the endpoint's own text, which is untrusted and may repeat what it was sent.
    if reply.status_code is None:
        return f"The endpoint did not respond: {reply.error}. Correct external.base_url, or try again later"
    why = _WHY.get(reply.status_code, "try again later, or choose another endpoint")
    return f"The endpoint returned status {reply.status_code}: {why}"


def _read(reply: Reply) -> Said:
    """Returns the answer in a chat completion. Raises NoAnswer if the body is not one."""
    try:
        body = json.loads(reply.body)
        message = body["choices"][0]["message"]
        usage = body.get("usage") or {}
        calls = [_call(one["function"]) for one in message.get("tool_calls") or ()]
        text = "\n".join([message.get("content") or "", *calls]).strip()
        counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        return Said(text, counts[0], counts[1], reply.seconds)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        raise NoAnswer("The endpoint's response is not a chat completion. Correct external.base_url") from None


def _call(function: Mapping[str, Any]) -> str:
    """Returns a tool call as text, in the form that the scorecard reads."""
    return json.dumps({"name": function["name"], "arguments": json.loads(function["arguments"])})


def _count(found: Any) -> int | None:
    return found if type(found) is int and found >= 0 else None
