"""Traces how a chat template places the contents of messages, which then need no rendering of their own.

A message's content is replaced by a symbol, which can be written, joined to text, and tested for being a text that is
not empty. Anything else that depends on it is refused. So a template that renders with symbols writes, for all
messages with the same roles, the same text around their contents.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, cast

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError

from tunery.rows import dialect

Test = Callable[..., Any]

_ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.NSRef, nodes.Scope),
    *(nodes.Name, nodes.Const, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.List, nodes.Tuple, nodes.Dict),
    *(nodes.Pair, nodes.Keyword, nodes.Call, nodes.Filter, nodes.Test, nodes.Compare, nodes.Operand, nodes.CondExpr),
    *(nodes.BinExpr, nodes.UnaryExpr, nodes.Concat, nodes.ExprStmt, nodes.EnvironmentAttribute),
    *(nodes.Break, nodes.Continue),
)
"""Nodes that neither capture what is written nor change it, as macros and `{% autoescape %}` do."""
_TESTS_OF_TYPE = {
    *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number"),
    *("sequence", "string", "true", "undefined"),
}
_ANY_TEXT = "x"
"""Stands for a text where only its type matters, and that it is neither empty nor blank."""


class Untraceable(SecurityError):
    """A template of which the text around the contents may depend on them."""


def _refuse(*_: object) -> NoReturn:
    raise Untraceable


class Symbol:
    """Texts that are joined, with numbers in place of contents. `is_trimmed`: a content without blanks around it.

    Refuses every operation of Python but the test for being true. Where a method is missing Python raises a TypeError,
    which jinja2 and some filters catch.
    """

    def __init__(self, parts: tuple[str | int, ...], *, is_trimmed: bool) -> None:
        self.parts, self.is_trimmed = parts, is_trimmed

    def __bool__(self) -> bool:
        return True

    __str__ = __repr__ = __format__ = __eq__ = __ne__ = __hash__ = __iter__ = __len__ = __contains__ = _refuse
    __getitem__ = __int__ = __float__ = __index__ = __lt__ = __le__ = __gt__ = __ge__ = __html__ = _refuse


class Environment(dialect.Environment):
    """Compiles chat templates to trace them."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()}
        self.tests = {name: _limited_test(name, cast(Test, function)) for name, function in self.tests.items()}
        self.finalize = self._write
        self._mark = ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, _ALLOWED) or (isinstance(node, nodes.For) and node.recursive):
                raise Untraceable
        return tree

    def trace(self, template: Template, variables: dict[str, Any], now: datetime, deadline: float) -> str:
        """Returns the pieces of the rendered text as a JSON list: text, and numbers of contents.

        In `variables` a content to be traced is a tuple of its number and whether it has no blanks around it.
        Raises Untraceable, or what `render` raises.
        """
        self._mark = secrets.token_hex(16)
        made = {**variables, "messages": [self._replace(message) for message in variables["messages"]]}
        text = self.render(template, made, now, deadline)
        pieces = re.split(f"{self._mark}:([0-9]+);", text)
        return json.dumps([int(piece) if at % 2 else piece for at, piece in enumerate(pieces) if at % 2 or piece])

    def _replace(self, message: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(message["content"], tuple):
            return message
        number, is_trimmed = message["content"]
        return {**message, "content": Symbol((number,), is_trimmed=is_trimmed)}

    def _write(self, value: Any) -> Any:
        """Returns what is written for a value. The mark is random, so that no template can write it."""
        if not isinstance(value, Symbol):
            return value
        return "".join(part if isinstance(part, str) else f"{self._mark}:{part};" for part in value.parts)

    def join_texts(self, *parts: Any) -> Any:
        return self._join(str, parts) if _has_symbol(parts) else super().join_texts(*parts)

    def add(self, context: Any, *terms: Any) -> Any:
        return self._join(_text, terms) if _has_symbol(terms) else super().add(context, *terms)

    def _join(self, spell: Callable[[Any], str], parts: tuple[Any, ...]) -> Symbol:
        joined = (part.parts if isinstance(part, Symbol) else (spell(part),) for part in parts)
        return Symbol(tuple(one for some in joined for one in some), is_trimmed=False)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return _refuse() if isinstance(obj, Symbol) else super().getattr(obj, attribute)

    def clock(self, _: datetime) -> Callable[[str], str]:
        """Returns a `strftime_now` that refuses: a text with the time is another one later."""
        return _refuse


def _has_symbol(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Symbol) for value in values)


def _text(term: Any) -> str:
    return term if isinstance(term, str) else _refuse()


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        symbols = [value for value in (*args, *kwargs.values()) if isinstance(value, Symbol)]
        if not symbols:
            return function(*args, **kwargs)
        is_alone = len(args) == 1 and not kwargs
        return symbols[0] if name == "trim" and is_alone and symbols[0].is_trimmed else _refuse()

    return limited


def _limited_test(name: str, function: Test) -> Test:
    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        if not _has_symbol((*args, *kwargs.values())):
            return function(*args, **kwargs)
        return function(_ANY_TEXT) if name in _TESTS_OF_TYPE and len(args) == 1 and not kwargs else _refuse()

    return limited
