"""A jinja2 environment for chat templates, which come with models and are therefore untrusted programs.

A template must render as it does in transformers, so its extensions are there (trim_blocks, lstrip_blocks, loop
controls, `{% generation %}`, tojson, raise_exception, strftime_now). Of jinja2's filters, tests and globals only those
that chat templates use are available. jinja2's sandbox keeps a template away from Python; budgets on top of it
limit loop rounds and macro calls, sizes of texts and numbers, and time. They are checked between operations, so a
single long operation can exceed them: `sandbox` therefore runs this module in a process that can be killed.

Imports jinja2 alone beside the standard library: every service starts that process.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from datetime import datetime
from functools import partial, reduce
from string import Formatter
from typing import Any

import jinja2
from jinja2 import Template, nodes, pass_environment, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format, do_indent, do_join, do_replace, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_ROUNDS = 200_000
MAX_SECONDS = 10.0
MAX_CHARACTERS = 16 * 2**20
MAX_BITS = 2048
MAX_INDENT = 64
FILTERS = (
    {"abs", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first", "float"}
    | {"format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min"}
    | {"reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort"}
    | {"string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount"}
)
TESTS = (
    {"!=", "<", "<=", "==", ">", ">=", "boolean", "callable", "defined", "divisibleby", "eq", "equalto", "escaped"}
    | {"even", "false", "float", "ge", "greaterthan", "gt", "in", "integer", "iterable", "le", "lessthan", "lower"}
    | {"lt", "mapping", "ne", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "upper"}
)
_GROWING_FILTERS = ("batch", "center", "format", "slice")
_WIDE_SPEC = re.compile(r"\d{5}|\{")
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")
"""A format's width or precision of five digits, or one given by an argument."""
_TEXT = {str}
_OF_A_DICT = frozenset(dir(dict))
_OF_A_LOOP = frozenset({"first", "last", "index", "index0", "length"})


class LimitExceeded(SecurityError):
    """A template that is too expensive: it grew, or ran, beyond a budget."""


class _Generation(Extension):
    """Parses and ignores `{% generation %}`, by which other trainers find an answer's tokens: see `template`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        # Its own scope, as in transformers: variables set inside end with it.
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """jinja2's namespace without underscored names, through which a template could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a legal key of a template's namespace
        Namespace.__init__(*args, **kwargs)
        for name in object.__getattribute__(args[0], "_Namespace__attrs"):
            _refuse_underscore(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the template stores '{name}': names with a leading underscore are not allowed")


class _Metered(NodeTransformer):
    """Makes a template count its loop rounds and measure joined texts. jinja2 finds the methods by node name."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return _counting(self.generic_visit(node))

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return _counting(self.generic_visit(node))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        joined = self.generic_visit(node)
        return _call("join_texts", joined.nodes).set_lineno(node.lineno)  # type: ignore[attr-defined]


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _counting(block: nodes.Node) -> nodes.Node:
    # `counted_round` is a property, because the sandbox's check of a call costs ten times as much as the count.
    count = nodes.ExprStmt(nodes.EnvironmentAttribute("counted_round")).set_lineno(block.lineno)
    block.body.insert(0, count)  # type: ignore[attr-defined]
    return block


class _Compiler(CodeGenerator):
    """Compiles a chain of `+`, as templates build messages, to one call. jinja2 finds methods by node name."""

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:  # noqa: N802
        self.write("environment.add(context")
        for term in _terms(node):
            self.write(", ")
            self.visit(term, frame)
        self.write(")")


def _terms(node: nodes.Expr) -> list[nodes.Expr]:
    """Returns the terms of a sum, from left to right."""
    terms: list[nodes.Expr] = []
    while isinstance(node, nodes.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


class Environment(ImmutableSandboxedEnvironment):
    """Compiles chat templates and renders them; each rendering has its own budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Compiler

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters = {name: function for name, function in self.filters.items() if name in FILTERS}
        self.tests = {name: function for name, function in self.tests.items() if name in TESTS}
        for name in _GROWING_FILTERS:
            self.filters[name] = _limited_filter(self.filters[name])
        self.filters |= {"replace": _replace, "join": _join, "indent": _indent, "sum": _sum, "tojson": _tojson}
        self.globals = {
            "range": self.globals["range"],
            "dict": _new_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
        }
        self._rounds, self._deadline = 0, 0.0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        """Returns a dict instead of jinja2's ChainMap, which is slow to copy into each rendering's context."""
        return {**self.globals, **(d or {})}

    @property
    def counted_round(self) -> None:
        """Counts a round. The compiled template reads this property in every loop round and macro call."""
        self._rounds += 1
        if self._rounds > MAX_ROUNDS or time.monotonic() > self._deadline:
            raise LimitExceeded(f"the template runs too long (limits: {MAX_ROUNDS:,} loop rounds, {MAX_SECONDS:g} s)")

    def join_texts(self, *parts: Any) -> str:
        """Implements `~` with a size limit: doubled in each of forty rounds, a text has 2^40 characters."""
        texts = [str(part) for part in parts]
        _refuse_size(sum(map(len, texts)))
        return "".join(texts)

    def add(self, context: Any, *terms: Any) -> Any:
        """Implements the operator `+` between all terms of a sum."""
        if set(map(type, terms)) == _TEXT:
            _refuse_size(sum(map(len, terms)))
            return "".join(terms)
        return reduce(partial(self.call_binop, context, "+"), terms)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Returns jinja2's result, with a fast path for the most frequent: a message's key, and a loop's position."""
        if type(obj) is dict and attribute in obj and attribute not in _OF_A_DICT:
            return obj[attribute]
        if type(obj) is LoopContext and attribute in _OF_A_LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Checks sizes before an operation: `"x" * 10**12` is a single one, which no count of rounds would catch."""
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _refuse_size(len(left) + len(right))
        elif operator == "*":
            _refuse_size(_product_size(left, right))
            _refuse_product(left, right)
        elif operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 16):
            raise LimitExceeded("the template raises a number to too large a power")
        elif operator == "%" and isinstance(left, str):
            _refuse_percent(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Checks sizes before a call: `"x".ljust(10**12)` is a single one."""
        _refuse_sizes(args, kwargs)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _refuse_growth(owner, method.__name__, args)
        return super().call(context, function, *args, **kwargs)

    def render(
        self, template: Template, variables: dict[str, Any], now: datetime, deadline: float | None = None
    ) -> str:
        """Returns the rendered text. Raises jinja2's TemplateError, or any Python error that the template causes.

        `deadline`: a time of the monotonic clock; None: MAX_SECONDS from now.
        """
        self._rounds = 0
        self._deadline = time.monotonic() + MAX_SECONDS if deadline is None else deadline
        return "".join(_limited(template.generate(**variables, strftime_now=self.clock(now))))

    def clock(self, now: datetime) -> Callable[[str], str]:
        """Returns a template's `strftime_now`."""
        return lambda form: now.strftime(form)


def _product_size(left: Any, right: Any) -> int:
    times, repeated = (left, right) if isinstance(left, int) else (right, left)
    return len(repeated) * times if isinstance(repeated, str | list | tuple) and isinstance(times, int) else 0


def _refuse_product(left: Any, right: Any) -> None:
    """Raises LimitExceeded for a product that is too large: sixty squarings are only sixty operations, but the last
    would take years."""
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
        raise LimitExceeded(f"the template computes a number of more than {MAX_BITS} bits")


def _refuse_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise LimitExceeded(f"the template builds a text or list larger than {MAX_CHARACTERS:,}")


def _refuse_sizes(arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    for argument in (*arguments, *named.values()):
        if isinstance(argument, int):
            _refuse_size(argument)


def _refuse_percent(form: str) -> None:
    if _WIDE_PERCENT.search(form):
        raise LimitExceeded("the template pads a text too far")


def _refuse_braces(form: str) -> None:
    if any(_WIDE_SPEC.search(spec or "") for _, _, spec, _ in Formatter().parse(form)):
        raise LimitExceeded("the template pads a text too far")


def _refuse_growth(text: str, method: str, arguments: tuple[Any, ...]) -> None:
    if method in ("format", "format_map"):
        _refuse_braces(text)
    elif method == "replace" and len(arguments) > 1:
        _refuse_size(text.count(str(arguments[0])) * len(str(arguments[1])))
    elif method == "join" and arguments and hasattr(arguments[0], "__len__"):
        _refuse_size(len(text) * len(arguments[0]))


@pass_eval_context
def _replace(context: EvalContext, value: Any, old: str, new: str, count: int | None = None) -> str:
    _refuse_growth(str(value), "replace", (old, new))
    return do_replace(context, value, old, new, count)


@pass_eval_context
def _join(context: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    parts = list(value)
    _refuse_growth(d, "join", (parts,))
    return str(do_join(context, parts, d, attribute))


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, step = str(value), len(width) if isinstance(width, str) else int(width)
    _refuse_size(len(text) + step * len(text.splitlines()))
    return do_indent(value, width, first, blank)


@pass_environment
def _sum(
    environment: jinja2.Environment, iterable: Iterable[Any], attribute: str | int | None = None, start: float = 0
) -> Any:
    """Sums numbers only: each addition of lists copies the growing one, which takes quadratic time."""
    terms = list(iterable) if attribute is None else list(map(make_attrgetter(environment, attribute), iterable))
    for term in (start, *terms):
        if not isinstance(term, int | float):
            raise TypeError(f"sum adds numbers, not {type(term).__name__}")
    return sum(terms, start)


def _limited_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    def limited(value: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_sizes(args, kwargs)
        if function is do_format:
            _refuse_percent(str(value))
        return function(value, *args, **kwargs)

    return limited


def _limited(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        _refuse_size(size)
        yield piece


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > MAX_INDENT:
        raise LimitExceeded(f"the template indents JSON by more than {MAX_INDENT}")
    # jinja2's own filter escapes HTML, which no model was trained to read.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
