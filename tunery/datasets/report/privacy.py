"""Finds personal data and secrets in rows."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

from tunery.datasets.report import check_digits, passwords, phones

if TYPE_CHECKING:
    from tunery.datasets.report.case import Case, Finding

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b", re.IGNORECASE)
_NUMBER = re.compile(r"[+\d][\d\s()./\u2010-\u2013-]{5,}\d")
"""What every phone, card, account and social security number has, so that few texts are searched for each of them."""
_TYPESET = {ord(sign): " " for sign in "\u00a0\u2007\u2009\u202f"} | {
    ord(sign): "-" for sign in "\u2010\u2011\u2012\u2013"
}
"""Spaces and hyphens of typesetting, by the one that is typed: as long, so that places stay the same."""
_KEY = re.compile(
    r"(?<![A-Za-z0-9_/+=.-])(?=[a-z/.-]*[A-Z0-9_+=])[A-Za-z0-9_/+=.-]{16,}|-----BEGIN|://[^\s/:]+:[^\s/@]+@"
)
"""What may be a key. No long word in small letters is one."""
_SHORT, _AROUND = 300, 100
"""Characters of a line that is read as a whole, and of a longer one before and after what may be a key: a detector can
take a time that is the square of a line's length."""
_GUESSING = frozenset(
    {
        "Base64 High Entropy String",
        "Hex High Entropy String",
        "Secret Keyword",
        "Public IP (ipv4)",
        "Cloudant Credentials",
    }
)
"""Detectors by randomness or a nearby word: in rows with code and arithmetic most of their hits are false."""
_MORE_KEYS = re.compile(
    r"\b(?:sk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|AIza[\w-]{35}|github_pat_\w{22,}|glpat-[\w-]{20,})"
)
_NAMED_KEY = re.compile(
    r"(?:api|access|secret|auth|client|private)[ _-]?(?:key|token|secret)[\"']?(?:\s*[:=]\s*|\s+is:?\s+)"
    r"(?P<quote>[\"'`\u201c])?(?P<key>[A-Za-z0-9_+/=.-]{16,}+)",
    re.IGNORECASE,
)
"""A long value after a name such as `api_key`."""
_SENT_KEY = re.compile(
    r"(?:\bbearer|\bauthorization[\"']?[ \t]*[:=][ \t]*[\"'`]?(?:bearer|basic|token))"
    r"[ \t]+(?P<quote>[\"'`\u201c])?(?P<key>[A-Za-z0-9_+/=.~-]{16,}+)",
    re.IGNORECASE,
)
"""What a request's header says: `Bearer ...`, `Authorization: Basic ...`."""
_MADE_UP = re.compile(r"your|example|xxx", re.IGNORECASE)
_NAME_IN_CODE = re.compile(r"[A-Za-z]+\d{0,4}(?:[._](?:[A-Za-z]+\d{0,4}|\d{1,4}))+")
"""Words with dots or underscores between, such as `settings.api_key_v2`."""
EMAIL, CARD, ACCOUNT = "an e-mail address", "a card number", "an account number"
SSN, PHONE, KEY = "a social security number", "a phone number", "a key or password"
_ACTION = "Replace it with a made-up value, or drop the row."


def find(case: "Case") -> Iterator["Finding"]:
    """Rows with an e-mail address, phone, card, account or social security number, or a key. The value is not shown."""
    from tunery.datasets.report.case import Finding  # imported here, as the API redacts without a report's libraries

    for row in case.rows:
        kinds = {kind: True for text in row.texts for kind in kinds_in(text)}
        if kinds:
            yield Finding("pii", [row.line], 1.0, f"Contains {' and '.join(kinds)}.", _ACTION)


def kinds_in(text: str) -> Iterator[str]:
    """Yields the kinds of personal data and secrets in a text."""
    yield from dict.fromkeys(place.kind for place in places_in(text))


class Place(NamedTuple):
    """Where a text holds personal data or a secret, and of what kind."""

    begin: int
    end: int
    kind: str


def places_in(text: str) -> Iterator[Place]:
    """Yields the places of personal data and secrets in a text, kind by kind. They may overlap."""
    if "@" in text:
        yield from (Place(*match.span(), EMAIL) for match in _EMAIL.finditer(text))
    if _NUMBER.search(text):
        yield from _numbers_in(text)
    if _KEY.search(text):
        yield from _secrets_in(text)
    yield from (Place(begin, end, KEY) for begin, end in passwords.find(text))


def _numbers_in(text: str) -> Iterator[Place]:
    text = text.translate(_TYPESET)
    yield from (Place(begin, end, CARD) for begin, end in check_digits.find_cards(text))
    yield from (Place(begin, end, ACCOUNT) for begin, end in check_digits.find_accounts(text))
    yield from (Place(begin, end, SSN) for begin, end in check_digits.find_persons(text))
    yield from (Place(begin, end, PHONE) for begin, end in phones.find(text))


def _secrets_in(text: str) -> Iterator[Place]:
    at = 0
    for line in text.split("\n"):
        for begin, end in _around_keys(line):
            yield from (
                Place(at + begin + start, at + begin + stop, KEY) for start, stop in _secrets_of(line[begin:end])
            )
        at += len(line) + 1


def _around_keys(line: str) -> Iterator[tuple[int, int]]:
    """Yields the parts of a line that may have a key, with what is next to it."""
    if len(line) <= _SHORT:
        if _KEY.search(line):
            yield 0, len(line)
        return
    for match in _KEY.finditer(line):
        yield max(0, match.start() - _AROUND), match.end() + _AROUND


_CLASSES: dict[str, Any] = get_mapping_from_secret_type_to_class()
_DETECTORS = [detector() for kind, detector in _CLASSES.items() if kind not in _GUESSING]


def _secrets_of(line: str) -> Iterator[tuple[int, int]]:
    """Yields the begin and end of each secret in a line or a part of one."""
    yield from (match.span() for match in _MORE_KEYS.finditer(line))
    for pattern in (_NAMED_KEY, _SENT_KEY):
        yield from (match.span("key") for match in pattern.finditer(line) if _is_key(match))
    for detector in _DETECTORS:
        if any(True for _ in detector.analyze_string(line)):
            # What the detector gives back is a group of its pattern, for some keys their first letters alone.
            matches = [match for pattern in detector.denylist for match in pattern.finditer(line)]
            yield from [match.span() for match in matches] or [(0, len(line))]


def _is_key(match: re.Match[str]) -> bool:
    key = match["key"]
    if match.string.startswith(("(", "["), match.end()) or _MADE_UP.match(key):
        return False
    if not match["quote"] and _NAME_IN_CODE.fullmatch(key):
        return False
    return re.search(r"\d", key) is not None and re.search(r"[A-Za-z]", key) is not None
