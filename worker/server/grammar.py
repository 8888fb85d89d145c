"""Constrains answers to JSON of a schema or a call of a tool, token by token with llguidance."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import llguidance
import numpy
import torch
from tokenizers import Tokenizer

from tunery.errors import InvalidValue
from tunery.rows.calls import ANY_ID, CallSpelling
from tunery.rows.messages import Tool
from worker.server import schema_check
from worker.server.schemas import ResponseFormat

_JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,40}"}
"""Whitespace between JSON's tokens: any that a model writes, but not without end."""
_LIMITS: dict[str, Any] = {"initial_lexer_fuel": 200_000, "max_grammar_size": 100_000}
"""A fifth of the library's own, by which a schema of 15,000 properties was compiled for seven seconds and then refused.
One of 5,000, OpenAI's limit, needs 0.3 s.
"""
_COMPLEX = "its patterns are too complex; use simpler ones, or fewer for one text"
_PLAINLY = {
    "oneOf constraints": "'oneOf' is supported if its schemas differ in type or in a 'const' text; use 'anyOf'",
    "too big": "the schema is too large; use fewer properties or shorter patterns",
    "Unable to determine if regex is empty": _COMPLEX,
}
"""What stands for some of the library's sentences, by their beginnings or a part of them."""


class Grammar:
    """The tokens that may come next. `allow` and `take` alternate until `is_complete`."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, source: str, param: str) -> None:
        """Raises InvalidValue naming `param` if the source cannot be compiled."""
        self._matcher = llguidance.LLMatcher(tokenizer, source, limits=llguidance.LLParserLimits(**_LIMITS))
        if self._matcher.is_error():
            raise InvalidValue(param=param, reason=f"Invalid '{param}': {_reason(self._matcher.get_error())}")

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allow(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the logits, with minus infinity for tokens that are not allowed."""
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        allowed = torch.from_numpy(numpy.unpackbits(bits, bitorder="little", count=len(logits))).bool()
        if not allowed.any():
            raise RuntimeError(f"no token may follow: {self._matcher.get_error()}")
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> None:
        """Advances the grammar by a token."""
        self._matcher.consume_token(token)


def read_vocabulary(tokenizer: Tokenizer, size: int, eos_ids: Iterable[int]) -> llguidance.LLTokenizer:
    """Returns a tokenizer for grammars; `size`: how many logits the model has, some of which may have no token."""
    size = max(size, tokenizer.get_vocab_size(with_added_tokens=True))
    return llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=sorted(eos_ids))


def schema_of(wanted: ResponseFormat) -> Any:
    """Returns the JSON schema of a `response_format`, closed to unnamed properties; None for text."""
    if wanted.type == "text":
        return None
    return _closed({"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_)


def of_format(wanted: ResponseFormat) -> str | None:
    """Returns the grammar of a `response_format`; None for text. Raises InvalidValue if it is not a valid schema."""
    if (schema := schema_of(wanted)) is None:
        return None
    try:
        made = str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=cast(Any, _JSON)))
    except ValueError as error:
        raise InvalidValue(
            param="response_format", reason=f"Invalid 'response_format': {_reason(str(error))}"
        ) from None
    _check([made], "response_format")
    return made


def of_call(tools: Sequence[Tool], spelling: CallSpelling, tokenizer: Tokenizer) -> str:
    """Returns the grammar of one call of one of these tools, as the template spells it. Raises InvalidValue if their
    schemas are too complex.
    """
    special = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    before, between, after = (_terminals(text, special) for text in (spelling.before, spelling.between, spelling.after))
    rules = [f"start: {' | '.join(f'call_{number}' for number in range(len(tools)))}"]
    schemas = [{**_closed(tool.function.parameters or {"type": "object"}), "x-guidance": _JSON} for tool in tools]
    _check([llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)) for schema in schemas], "tools")
    for number, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        rules += [
            f"call_{number}: {before} {_text(tool.function.name)} {between} arguments_{number} {after}",
            f"arguments_{number}: %json {json.dumps(schema)}",
        ]
    return str(llguidance.LLMatcher.grammar_from_lark("\n".join(rules) + "\n"))


def _check(grammars: Sequence[str], param: str) -> None:
    """Raises InvalidValue for schemas that would take the server's memory or time to compile."""
    if not schema_check.can_be_compiled(grammars, _LIMITS):
        raise InvalidValue(param=param, reason=f"Invalid '{param}': {_COMPLEX}.")


def _closed(schema: Any) -> Any:
    """Forbids properties that the schema does not name, unless it says otherwise: a small model would add more up to
    the end of its context. Parts of an `allOf` are left alone, since each names some of the properties.
    """
    if isinstance(schema, list):
        return list(map(_closed, schema))
    if not isinstance(schema, dict):
        return schema
    made = {**schema}
    for name in ("items", "prefixItems", "anyOf", "oneOf"):
        if name in made:
            made[name] = _closed(made[name])
    for name in ("properties", "$defs", "definitions"):
        if isinstance(made.get(name), dict):
            made[name] = {key: _closed(value) for key, value in made[name].items()}
    is_open = "properties" in made and not made.keys() & {"additionalProperties", "allOf", "patternProperties"}
    return {**made, "additionalProperties": False} if is_open else made


def _terminals(text: str, special: dict[str, int]) -> str:
    """Returns a text as grammar terminals: special tokens by their ids, a call's id as any nine letters or digits."""
    marks = sorted((*special, ANY_ID), key=len, reverse=True)
    pieces = [piece for piece in re.split(f"({'|'.join(map(re.escape, marks))})", text) if piece]
    return " ".join(
        "/[a-zA-Z0-9]{9}/" if piece == ANY_ID else f"<[{special[piece]}]>" if piece in special else _text(piece)
        for piece in pieces
    )


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _reason(text: str) -> str:
    """Returns what the library says, in a line that tells what to change."""
    if (plain := next((plain for part, plain in _PLAINLY.items() if part in text), None)) is not None:
        return plain
    first, *others = text.strip().splitlines()
    return f"{first} {others[-1].removeprefix('error: ')}" if others and first.endswith(":") else first
