"""Finds numbers with check digits: of cards, bank accounts and persons (social security).

One with wrong check digits has a typing error, but is still somebody's where its form is right and a word before it
says what it is. Without such a word it may be any number.
"""

import re
from collections.abc import Iterator

from stdnum import iban, luhn
from stdnum.us import ssn

from tunery.datasets.report import number_names
from tunery.datasets.report.number_names import ACCOUNT, CARD, PERSON

_CARD = re.compile(
    r"(?<![\w.,-])(?<!\b[A-Za-z]{2}\d\d[ -])(?<!\b[A-Z]{2}\d\d[ -][A-Z]{4}[ -])(?<!(?<![\w/.-])\d{4}[ -])"
    r"(?:[2-68]\d|97)\d\d(?:(?![ -]\d\d ?/ ?\d\d)[ -]?\d){10,15}(?![\w-]|[.,]\d)(?!(?:[ -]\d{4}){2}(?!\d))"
)
"""Not inside a longer run of groups, such as an account number; `12/27` after it is not a part of it."""
_ISSUERS = (
    (r"4", (16, 18, 19)),  # Visa
    (r"5[1-5]|22(?:2[1-9]|[3-9])|2[3-6]|27(?:[01]|20)", (16,)),  # Mastercard
    (r"3[47]", (15,)),  # American Express
    (r"30[0-5]|3[689]", (14, 16, 19)),  # Diners Club
    (r"6011|64[4-9]|65", (16, 19)),  # Discover
    (r"35(?:2[89]|[3-8])", (16, 17, 18, 19)),  # JCB
    (r"62|81|220[0-4]", (16, 17, 18, 19)),  # UnionPay, Mir
    (r"50|5[6-9]|6[037]", (16, 18, 19)),  # Maestro, RuPay, Elo, Verve
    (r"82|9792", (16,)),  # RuPay, Troy
)
"""First digits and lengths of the cards of each network, after the package credit-card-type. Visa's of 13 digits and
Maestro's below 16 are no longer issued, and such numbers are mostly times, sums and codes of goods."""
_IBAN = re.compile(r"\b[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}\b")
_HEAD = 4
"""Signs of an account number's country and check digits."""
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yields where the card numbers of a text begin and end."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _is_issued(digits) and len(set(digits)) > 1 and _counts(CARD, luhn.is_valid(digits), match):
            yield match.span()


def _is_issued(digits: str) -> bool:
    return any(len(digits) in sizes and re.match(first, digits) for first, sizes in _ISSUERS)


def find_accounts(text: str) -> Iterator[tuple[int, int]]:
    """Yields where the international account numbers of a text begin and end."""
    for match in _IBAN.finditer(text):
        size = _account_size(match[0])
        # An account number that is right is one also after `reference`, as there is hardly another number like it.
        if size and (_is_account(match[0][:size]) or number_names.nearest(text, match.start()) == ACCOUNT):
            yield match.start(), match.start() + size


def find_persons(text: str) -> Iterator[tuple[int, int]]:
    """Yields where the social security numbers of a text begin and end."""
    yield from (match.span() for match in _SSN.finditer(text) if _counts(PERSON, ssn.is_valid(match[0]), match))


def _counts(kind: str, is_valid: bool, match: re.Match[str]) -> bool:
    """Whether digits of the right form are such a number: by their check digits, unless they are named otherwise, or by
    their name."""
    if is_valid:
        return not number_names.is_another(match.string, match.start())
    return number_names.nearest(match.string, match.start()) == kind


def _account_size(text: str) -> int:
    """Returns the length of what has the form of an account number at a text's beginning, or 0. The text may include
    capitalised words after the number."""
    ends = [match.start() for match in re.finditer(r"[ -]|$", text)]
    return next((end for end in reversed(ends) if _has_form(text[:end])), 0)


def _has_form(text: str) -> bool:
    """Whether a text has the length and signs of its country's account numbers, whatever its check digits."""
    bare = re.sub(r"[ -]", "", text)
    return len(bare) > _HEAD and _is_account(f"{bare[:2]}{iban.calc_check_digits(bare)}{bare[_HEAD:]}")


def _is_account(text: str) -> bool:
    # Whether there is such a bank does not matter: it is unknown for most countries, and made-up numbers count too.
    return iban.is_valid(re.sub(r"[ -]", "", text), check_country=False)
