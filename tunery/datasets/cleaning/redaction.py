"""Replaces personal data and secrets in rows by placeholders that name their kind."""

import json
import re
from typing import Any

from tunery.datasets.report import privacy

_NAMES = {
    privacy.EMAIL: "<EMAIL_ADDRESS>",
    privacy.PHONE: "<PHONE_NUMBER>",
    privacy.CARD: "<CREDIT_CARD>",
    privacy.ACCOUNT: "<IBAN_CODE>",
    privacy.SSN: "<US_SSN>",
    privacy.KEY: "<SECRET>",
}
"""Placeholders, with Presidio's names."""
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_STRING_OR_PLACEHOLDER = re.compile(rf'"(?:[^"\\]|\\.)*+"|{"|".join(_NAMES.values())}', re.DOTALL)
_ARGUMENTS = "arguments"
"""The key of a call's arguments, which a report reads as JSON text, with their names."""
_AROUND = 20
_ROUNDS = 3


def redact(value: Any) -> Any:
    """Returns a row's value with its texts redacted; keys of objects stay."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: _redact_member(key, inner) for key, inner in value.items()}
    return [redact(inner) for inner in value] if isinstance(value, list) else value


def _redact_member(key: str, value: Any) -> Any:
    if key != _ARGUMENTS or not isinstance(value, dict):
        return redact(value)
    spelled = json.dumps(value, ensure_ascii=False)
    redacted = redact_text(spelled)
    return json.loads(redacted) if redacted != spelled and _is_json(redacted) else redact(value)


def redact_text(text: str) -> str:
    """Returns the redacted text; an object or a list in JSON stays one."""
    redacted = _redact_places(text)
    if redacted == text or not _is_json(text) or _is_json(redacted):
        return redacted
    return _STRING_OR_PLACEHOLDER.sub(lambda found: found[0] if found[0][0] == '"' else f'"{found[0]}"', redacted)


def _is_json(text: str) -> bool:
    """Whether a text is an object or a list in JSON."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _redact_places(text: str) -> str:
    """Returns the text with placeholders. It is searched again, as text beside one may only then look personal."""
    text = _KEY_BLOCK.sub(_NAMES[privacy.KEY], text)
    for _ in range(_ROUNDS):
        places = sorted(privacy.places_in(text))
        if not places:
            break
        text = _replace(text, places)
    return text


def _replace(text: str, places: list[privacy.Place]) -> str:
    """Replaces the sorted `places`. Overlapping ones get the first one's placeholder."""
    parts, at = [], 0
    for begin, end, kind in places:
        if begin >= at:
            parts += [text[at:begin], _NAMES[kind]]
        at = max(at, end)
    return "".join([*parts, text[at:]])


def excerpt(before: Any, after: Any) -> str:
    """Returns the placeholders that a redaction has written, with the redacted text around each."""
    if isinstance(after, str):
        return "" if before == after else _around(after)
    if isinstance(after, dict):
        found = [excerpt(before.get(key), inner) for key, inner in after.items()]
    elif isinstance(after, list):
        found = [excerpt(*both) for both in zip(before, after, strict=True)]
    else:
        found = []
    return " ".join(filter(None, found))


def _around(text: str) -> str:
    """Returns the placeholders with the text before each; dots stand for what is left out."""
    names = "|".join(map(re.escape, _NAMES.values()))
    parts, at = [], 0
    for match in re.finditer(rf".{{0,{_AROUND}}}(?:{names})", text):
        parts += [match[0]] if match.start() == at else [" \u2026 ", match[0].lstrip()]
        at = match.end()
    return "".join(parts).strip()
