"""Parses untrusted JSON strictly by RFC 8259, as Python's parser accepts more than is safe."""

import json
from collections import Counter
from typing import Any

MAX_DEPTH = 32
_MOST_DIGITS = 1000
_PYTHON_ONLY = ("'", "None", "True", "False")


class NotJSON(ValueError):
    """Invalid JSON; `problem` is the parser's message, `position` the index of the character."""

    def __init__(self, error: json.JSONDecodeError) -> None:
        self.problem = error.msg
        self.position = error.pos
        self.is_python = error.doc.startswith(_PYTHON_ONLY, error.pos)
        what = "it is a Python literal; write it with json.dumps" if self.is_python else error.msg
        super().__init__(f"{what} (column {error.colno}).")


def load_object(text: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises ValueError, with a readable reason, for anything but one object, and for what `load_value` refuses.
    """
    value = load_value(text)
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004 (callers treat every error in a line as a ValueError)
            f"expected a JSON object in braces, found {kind(value)}."
        )
    return value


def load_value(text: str) -> Any:
    """Parses a JSON value.

    Raises ValueError, with a readable reason, for NaN and Infinity (also as `1e999`), a key that an object has twice
    (parsers disagree on which value counts, and one of them would be lost), lone surrogates (UTF-8, and so tokenizers
    and databases, cannot represent them), the character NUL (PostgreSQL cannot store it) and nesting deeper than
    MAX_DEPTH; its subclass NotJSON for invalid JSON.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise NotJSON(error) from None
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _refuse_depth(text, value)
    _refuse_lone_surrogates(text, value)
    _refuse_nul(text, value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; use null or a number.")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]} is too large.")
    return value


def _whole(digits: str) -> int:
    # Python itself refuses more than 4300 digits, but its message says to change the interpreter's limit.
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits, more than {_MOST_DIGITS}; write it as a string.")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(
            f"an object has the key {json.dumps(twice[:40])} twice. Keep one of them, or rename the other."
        )
    return value


# Built once, because json.loads builds one for each text.
_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_object
)


def _too_deep() -> str:
    return f"objects and lists are nested more than {MAX_DEPTH} deep."


def _refuse_depth(text: str, value: Any) -> None:
    # Counting brackets is cheap and decides nearly every line; only the others are traversed.
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(_too_deep())


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _refuse_lone_surrogates(text: str, value: Any) -> None:
    # Decoded UTF-8 has no lone surrogates, so only an escape can produce one.
    if "\\u" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a \\u escape names half a surrogate pair; the character it stands for is missing.") from None


def _refuse_nul(text: str, value: Any) -> None:
    # The parser refuses a literal NUL, like every control character. The text of the escape is not enough: after an
    # escaped backslash, as in `\\u0000`, it is plain text.
    if "\\u0000" in text and _holds_nul(value):
        raise ValueError("a \\u0000 escape stands for the character NUL, which cannot be stored. Remove it.")


def _holds_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any("\0" in key or _holds_nul(child) for key, child in value.items())
    if isinstance(value, list):
        return any(map(_holds_nul, value))
    return isinstance(value, str) and "\0" in value


def kind(value: object) -> str:
    """Returns the name of a value's JSON type with its indefinite article, such as `a string`."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
