"""Personal data and secrets in rows."""

import re
from collections.abc import Iterator
from typing import Any

import phonenumbers
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from phonenumbers import Leniency, PhoneNumberMatcher
from stdnum import iban, luhn
from stdnum.us import ssn

from tunery.datasets.report.case import Case, Finding

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.,-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|[.,]\d)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]){11,30}\b")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_PHONE = re.compile(r"(?<![\w.,/*=-])(?:\+|\(?\d)[\d\s().-]{6,}\d(?![\w*/=-])")
_OFFICE = "US"
"""Where numbers without a country's code are taken to be from."""
_KEY = re.compile(r"[A-Za-z0-9_/+=.-]{16,}|-----BEGIN|://[^\s/]+:[^\s/]+@")
_GUESSING = frozenset(
    {
        "Base64 High Entropy String",
        "Hex High Entropy String",
        "Secret Keyword",
        "Public IP (ipv4)",
        "Cloudant Credentials",
    }
)
"""Detectors that judge by randomness or by a word nearby: in rows with code and sums most of their hits are none."""
_MORE_KEYS = re.compile(
    r"\b(?:sk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|AIza[\w-]{35}|github_pat_\w{22,}|glpat-[\w-]{20,})"
)
_ACTION = "Replace it with a made-up value, or drop the row."


def find(case: Case) -> Iterator[Finding]:
    """Rows with an e-mail address, phone, card, account or social security number, or a key. The value is not shown."""
    for row in case.rows:
        kinds = {kind: True for turn in row.turns for kind in kinds_in(turn.text)}
        if kinds:
            yield Finding("pii", [row.line], 1.0, f"Holds {' and '.join(kinds)}.", _ACTION)


def kinds_in(text: str) -> Iterator[str]:
    """What kinds of personal data and secrets a text holds."""
    if "@" in text and _EMAIL.search(text):
        yield "an e-mail address"
    if any(map(str.isdigit, text)):
        yield from _numbers_in(text)
    if _KEY.search(text) and any(map(_holds_secret, filter(_KEY.search, text.split("\n")))):
        yield "a key or password"


def _numbers_in(text: str) -> Iterator[str]:
    if any(_is_card(match[0]) for match in _CARD.finditer(text)):
        yield "a card number"
    if any(_is_account(match[0]) for match in _IBAN.finditer(text)):
        yield "an account number"
    if any(ssn.is_valid(match[0]) for match in _SSN.finditer(text)):
        yield "a social security number"
    if any(_is_phone(match[0]) for match in _PHONE.finditer(text)):
        yield "a phone number"


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn.is_valid(digits)


def _is_account(text: str) -> bool:
    """Words behind the number may have been taken with it, where they are in capitals."""
    parts = text.split(" ")
    return any(iban.is_valid("".join(parts[:count])) for count in range(len(parts), 0, -1))


def _is_phone(text: str) -> bool:
    if text.startswith("+"):
        # Also numbers that a country keeps for films: who makes up data takes them, and a check must find them.
        return any(True for _ in PhoneNumberMatcher(text, None, leniency=Leniency.POSSIBLE))
    if not re.search(r"\d[ ().-]+\d", text):
        return False
    return any(
        phonenumbers.is_valid_number(match.number)
        for match in PhoneNumberMatcher(text, _OFFICE, leniency=Leniency.STRICT_GROUPING)
    )


_CLASSES: dict[str, Any] = get_mapping_from_secret_type_to_class()
_DETECTORS = [detector() for kind, detector in _CLASSES.items() if kind not in _GUESSING]


def _holds_secret(line: str) -> bool:
    if _MORE_KEYS.search(line):
        return True
    return any(True for detector in _DETECTORS for _ in detector.analyze_string(line))
