"""Finds passwords and PINs that a text gives after their name: `password: ...`, `my PIN is ...`, `--password ...`."""

import re
from collections.abc import Iterator

_NAMES = (
    r"pass[ _-]?(?:word|phrase|code)|passwort|passwd|mot de passe|(?<![^\W_])pwd?(?![^\W_])|kennwort|contraseña|senha"
    r"|wachtwoord|hasło|lösenord|adgangskode|salasana|heslo|şifre|пароль|密[码碼]|パスワード|비밀번호"
)
_PIN = r"(?<![^\W_])pin(?:[ -]?(?:number|nummer|code))?(?![^\W_])"
_FOR = r"(?:\s+(?:for|of|on|at|für|zu[mr]?|vo[nm]|pour|de|du|del|para|per|voor|van|till|do)(?:\s+[\w@.'-]+){1,4}?)?"
_IS = (
    r"(?:\s*(?:[:\uff1a]|=(?![=>])|=>(?=\s*[\"']))\s*|\s*[はが是为為]\s*"
    r"|\s+(?:is|was|to|ist|war|lautet|es|est|é|è|är|er|jest|je|on):?\s+)"
)
_VALUE = r"[^\s\"'`\u201c\u201d\u2018\u2019«»\u201e,;<>(){}\[\]|\u3000-\u9fff\uac00-\ud7af\uff00-\uffef]{4,64}+"
_GIVEN = re.compile(
    rf"(?P<option>(?<![\w-])--(?:\w+-)?)?(?:(?P<pin>{_PIN})|{_NAMES})[\"'\u201d]?{_FOR}(?:{_IS}|(?(option)[ \t]+|(?!)))"
    rf"(?P<quote>[\"'`\u201c\u2018«\u201e])?(?P<value>{_VALUE})(?![(\[{{<])",
    re.IGNORECASE,
)
_OTHER_PARTS = ("contraseña", "hasło", "lösenord", "şifre", "пароль", "密", "パスワード", "비밀번호")
_NAME = re.compile(f"{_PIN}|{_NAMES}")
_MIXED = re.compile(r"(?=.*\d)(?=.*[^\W\d_])|[^\W\d_][@#$^!]+[^\W\d_]")
"""Letters with a digit or with a sign between them: `password: required` gives none."""
_SIGN = re.compile(r"[\d@#$^!]")
"""What every value below has."""
_DIGITS = re.compile(r"\d{4,12}")
_POSTCODE = 6
_NO_PASSWORD = re.compile(
    r"""[^\w!#?~^+-].*  # such as $PASSWORD
    | (?:\w*_)?(?:pass|password|passwd|pwd|pin|pw)_?\d  # a name in code
    | \d+-?(?:st|nd|rd|th|h|am|pm|min|[mg]b|bits?|bytes?|chars?|characters?|digits?|letters?|days?|zeichen|stellig|mal)
    | (?:sha|md|base|utf|aes|rsa|wpa|ripemd|argon|s?crypt|bcrypt|pbkdf|ntlm|v|level|step|option)-?\d.*
    | .*(?:example|xxx|placeholder|changeme|:[/\\]).*
    """,
    re.IGNORECASE | re.VERBOSE,
)
_MEMBER = re.compile(r"[^\W\d]\w*(?:(?:\.|->|::)[^\W\d]\w*)+")
"""A member of an object in code."""
_COUNTED = re.compile(
    r"[ -](?:digits?|numbers?|letters?|char(?:acter)?s?|bits?|bytes?|times|tries|attempts|days|hours|minutes|years"
    r"|zeichen|stellen|ziffern|mal)\b",
    re.IGNORECASE,
)


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yields where the passwords and PINs of a text begin and end."""
    if not (_SIGN.search(text) and _may_have_one(text.lower())):
        return
    for match in _GIVEN.finditer(text):
        value = match["value"].rstrip(".?:!#" if match["pin"] else ".?:")
        if _is_secret(match, value) and not _COUNTED.match(text, match.end()):
            yield match.start("value"), match.start("value") + len(value)


def _may_have_one(small: str) -> bool:
    # Most texts have no part of a name, which is seen in a fraction of the time that the names take; written out, as a
    # loop would take as long again.
    has_part = "pass" in small or "pin" in small or "pw" in small or "kennwort" in small or "senha" in small
    has_part = has_part or "wachtwoord" in small or "adgangskode" in small or "salasana" in small or "heslo" in small
    if not has_part and (small.isascii() or not any(part in small for part in _OTHER_PARTS)):
        return False
    return _NAME.search(small) is not None


def _is_secret(match: re.Match[str], value: str) -> bool:
    if match["pin"]:
        # India's postcodes are PIN codes too.
        return _DIGITS.fullmatch(value) is not None and (len(value) != _POSTCODE or "code" not in match["pin"].lower())
    if _NO_PASSWORD.fullmatch(value) or (not match["quote"] and _MEMBER.fullmatch(value)):
        return False
    return _MIXED.search(value) is not None or _DIGITS.fullmatch(value) is not None
