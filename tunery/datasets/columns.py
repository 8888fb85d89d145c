"""Reads columns as a query and `--columns` have them."""

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from tunery import field_errors
from tunery.errors import InvalidValue
from tunery.spec import Columns


class _Named(BaseModel):
    columns: Columns


def parse(text: str) -> Columns:
    """The columns that `prompt=Frage,completion=Antwort` names, or a JSON object, as names may have commas.

    Raises InvalidValue.
    """
    pairs = _json_pairs(text) if text.startswith("{") else _spelled_pairs(text)
    given = dict(pairs)
    if len(given) < len(pairs):
        twice = next(part for at, (part, _) in enumerate(pairs) if part in dict(pairs[:at]))
        raise InvalidValue(param="columns", reason=f"'columns' has '{twice[:40]}' twice. Keep one of them.")
    try:
        return Columns.model_validate(given)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", "columns", *fault["loc"])} for fault in error.errors()]
        raise field_errors.explain(faults, {"columns": given}, _Named) from None


def _json_pairs(text: str) -> list[tuple[str, Any]]:
    try:
        pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(param="columns", reason=f"'columns' is no JSON object: {error}. Correct it.") from None
    return pairs


def _spelled_pairs(text: str) -> list[tuple[str, Any]]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(part.strip() and name.strip() for part, _, name in pairs):
        reason = (
            "Write 'columns' as part=column,part=column, such as prompt=Frage,completion=Antwort. If a name has a "
            'comma, write a JSON object, such as {"prompt": "Frage, kurz", "completion": "Antwort"}.'
        )
        raise InvalidValue(param="columns", reason=reason)
    return [(part.strip(), name.strip()) for part, _, name in pairs]
