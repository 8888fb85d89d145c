"""Finds phone numbers: international ones by their code, national ones by their form or a word such as `call` there.

A text's language says little about the country of a number in it, as support is given in English everywhere. So a
number counts if it is valid in any of the regions below, and a word must be there where its form alone is not enough.
"""

import re
from collections.abc import Iterator

import phonenumbers
from phonenumbers import Leniency, NumberParseException, PhoneNumberMatcher

from tunery.datasets.report import number_names
from tunery.datasets.report.number_names import NO_PHONES, PHONES

_INTERNATIONAL = re.compile(
    r"(?<![\w/*=-])(?!(?<=[\d)] )\+ )(?:\((?=\+\d{1,3}\)))?\+(?:[\d\s().-]|/(?=\d{3})|/ (?=\d{3})){6,}\d(?![\w*=-]|/\d)"
)
"""Not what a sum adds: `2 + 442079460018`."""
_NATIONAL = re.compile(
    r"""(?<![A-Za-z0-9_.,/*+$€£¥₹\#-]) (?<![\d$€£¥₹][ ]) (?<!\d\)[ ])
    (?: 00 [ ]? [1-9]\d{0,3} (?: [ ]? \(0\) [ ]? \d{1,5} )? (?: [ ./-] \d{1,8} ){1,6}  # abroad
    | (?: \(\d{1,6}\) | \d{1,6} ) (?: [ .-]? | [ ]?/[ ]? ) \d{2,8} (?: [ .-] \d{2,5} ){0,4} )
    (?! [A-Za-z0-9_*=%°$€£¥₹] | -[A-Za-z] | [ ]? [-+*/.,:=] [ ]? \d | [ ] [\d$€£¥₹%°+*=] )""",
    re.VERBOSE,
)
_LEAST, _LEAST_OF_FORM, _MOST = 7, 9, 15
"""Digits of a number, and of one that is known by its form alone."""

_OFFICE = "US"
_TRUNK = ("GB", "FR", "DE", "NL", "AU", "JP", "CH", "AT", "IE", "ZA", "SE", "KR", "BE", "NZ", "IT", "TR")
"""Regions in which a national number begins with 0."""
_REGIONS = (
    *("US", *_TRUNK, "ES", "PT", "PL", "MX", "BR", "IN", "CN", "CZ", "DK", "NO", "FI", "GR", "SG", "HK", "TW"),
    *("AR", "CL", "CO", "PE", "IL", "AE", "RU", "UA", "HU", "RO", "TH", "MY", "ID", "PH", "VN", "NG", "KE", "EG"),
)
_MADE_UP = re.compile(r"1?[2-9]\d\d55501\d\d|07700900\d{3}|01632960\d{3}")
"""Ranges that the United States and Britain keep for films, from which made-up data are taken."""
_LOCAL = re.compile(r"[2-9]\d\d[ .-]\d{4}")
"""A number of the United States without its area code."""
_NO_PHONE = re.compile(
    r"""(?:19|20)\d\d[-./ ]\d\d?[-./ ]\d\d?\b.*  # a date
    | \d\d?[-./ ]\d\d?[-./ ](?:19|20)\d\d\b.*
    | \d{3}-\d\d-\d{4}  # a social security number
    | \(?(?:1\d|20)\d\d\)?(?:[ -]+(?:1\d|20)?\d\d)+  # years
    | \d{1,3}(?:\.\d{1,3}){3}  # an address of a computer
    | \d{1,2}\.\d+ | [1-9]\d*\.\d+  # a decimal number
    | [1-9]\d{0,2}(?:\.\d{3})+  # an amount
    """,
    re.VERBOSE,
)
_RANGE = re.compile(r"\d+|\d{1,5} ?[-/] ?\d{1,5}|[1-9]\d{0,2}(?: \d{3})+")
"""Digits that are as likely a count, a range or an amount."""
_DIFFERENT = 3
"""Least different characters of a number."""

_CALLS = (
    r"(?:call(?:s|ing|back)?|dial(?:ed|led|ing|ling)?|ring(?:ing)?|text(?:ing)?|reach(?:ed|able|ing)?"
    r"|contact\w*|anruf\w*|ruf(?:e|en|t)?|angerufen|erreich\w*|meld\w*|appel\w*|rappel\w*|join(?:dre|able|ables)"
    r"|llam\w*|chiam\w*|richiam\w*|contatt\w*|lig(?:ar|ue|uem)|bel(?:len|t)?|bereik\w*|(?:za)?dzwo\w*)"
)
_NUMBERS = r"(?:numbers?|nummer|numéro|número|numero|numer)"
_WORDS = re.compile(
    rf"(?<![^\W_])(?:(?P<other>{NO_PHONES})|(?P<phone>{PHONES})|(?P<number>{_NUMBERS})|(?P<call>{_CALLS}))(?![^\W_])"
    r"|(?P<sign>電話|电话|手机|手機|携帯|ファックス|联系方式|전화|휴대폰|연락처|फ़ोन|मोबाइल|هاتف|جوال|☎|📞|📱)",
    re.IGNORECASE | re.VERBOSE,
)
_FOLLOWS = re.compile(
    rf"[ ,]{{0,2}}\(?(?:(?:is|it's|was|ist|est|es|è|é)[ ])?(?:\w{{1,20}}[ ]){{0,2}}{PHONES}(?![^\W_])",
    re.IGNORECASE | re.VERBOSE,
)
_COUNTED = re.compile(
    r" (?:people|persons|men|women|children|members|users|customers|clients|employees|students|patients|households"
    r"|(?:view|read|listen|subscrib|follow|play|vot|work|own)ers|visitors|homes|copies|units"
    r"|items|points|miles|steps|times|euros?|dollars?|pounds|rupees|leute|menschen|personen|kunden|mitglieder|stück"
    r"|personnes|clients|personas|clientes|persone|clienti|pessoas)\b",
    re.IGNORECASE,
)
"""What a number before it counts."""
_NAMES = frozenset({"phone", "sign"})


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yields where the phone numbers of a text begin and end."""
    yield from (match.span() for match in _INTERNATIONAL.finditer(text) if _is_possible(match[0]))
    for match in _NATIONAL.finditer(text):
        begin, end = match.span()
        digits = sum(map(str.isdigit, match[0]))
        if _LEAST <= digits <= _MOST and not _NO_PHONE.fullmatch(match[0]) and _is_phone(text, begin, end):
            yield begin, end


def _is_possible(text: str) -> bool:
    # Also numbers that a country keeps for films: who makes up data takes them, and a check must find them.
    return any(True for _ in PhoneNumberMatcher(text, None, leniency=Leniency.POSSIBLE))


def _has_its_form(number: str) -> bool:
    """Whether a number is grouped as in its region, so that it can hardly be another one."""
    digits = re.sub(r"\D", "", number)
    if len(digits) < _LEAST_OF_FORM or digits == number:
        return False
    if _MADE_UP.fullmatch(digits):
        return True
    if digits.startswith("00"):
        return _is_valid_in(None, f"+{digits[2:]}")
    regions = _TRUNK if digits[0] == "0" else (_OFFICE,) if len(digits) > 9 else ()
    return any(_is_valid_in(region, digits) and _is_grouped_as_in(region, number) for region in regions)


def _is_grouped_as_in(region: str, number: str) -> bool:
    return any(True for _ in PhoneNumberMatcher(number, region, leniency=Leniency.STRICT_GROUPING))


def _is_phone(text: str, begin: int, end: int) -> bool:
    """Whether the digits there are a phone number, by their form or by the words beside them."""
    number = text[begin:end]
    said = [match.lastgroup for match in _WORDS.finditer(number_names.before(text, begin))]
    is_named = bool(said) and (said[-1] in _NAMES or ("other" not in said and bool(_NAMES & {*said})))
    if said and said[-1] == "other" and not {*_NAMES, "number"} & {*said}:
        return False
    if _has_its_form(number) or (is_named and _LOCAL.fullmatch(number)):
        return True
    is_named = is_named or (not said and _FOLLOWS.match(text, end) is not None)
    is_called = bool(said) and "other" not in said and not (_RANGE.fullmatch(number) or _COUNTED.match(text, end))
    return (is_named or is_called) and len(set(number)) >= _DIFFERENT and _is_valid(number)


def _is_valid(number: str) -> bool:
    """Whether a number is valid in any region, or kept for films."""
    digits = re.sub(r"\D", "", number)
    if _MADE_UP.fullmatch(digits):
        return True
    return any(_is_valid_in(region, digits) for region in _REGIONS)


def _is_valid_in(region: str | None, digits: str) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(digits, region))
    except NumberParseException:  # what may be another country's code is none
        return False
