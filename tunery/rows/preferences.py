"""Rows of preference tuning: a conversation that ends with the preferred answer, and the other answer."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import ValidationError, model_validator

from tunery.rows import filled, keys, reasons
from tunery.rows.formats import SourceRow
from tunery.rows.messages import Example, FileRole, Message, invalid, read_functions, refuse
from tunery.rows.pairs import PairShape
from tunery.rows.shapes import FileShape


class Pair(Example):
    """A preference row. `messages`: the prompt and the preferred answer, the only one that is learned."""

    dispreferred: Message

    @model_validator(mode="before")
    @classmethod
    def _read_row(cls, row: Any) -> Any:
        fields = keys.present(row)
        if reason := keys.find_meaning(fields, of_a_pair=True):
            refuse(reason)
        return filled.clean_calls(read_functions(fields))

    @model_validator(mode="after")
    def _answers_differ(self) -> "Pair":
        preferred, other = self.messages[-1], self.dispreferred
        for name, answer in (("preferred", preferred), ("other", other)):
            if answer.is_silent:
                refuse(f"has an empty answer (the {name} one). Give it a text, or remove the row.")
        if preferred.for_template() == other.for_template():
            refuse("has two equal answers, so there is nothing to prefer. Correct one of them, or remove the row.")
        return self

    @cached_property
    def rejected(self) -> Example:
        """The same conversation with the other answer."""
        return self.model_copy(update={"messages": [*self.messages[:-1], self.dispreferred]})


def parse_pair(source: SourceRow, role: FileRole = "training") -> Pair:
    """Parses one row of a file of pairs. Raises InvalidTrainingFile, naming row and message (from 1)."""
    shape = source.shape or FileShape()
    try:
        fields = shape.convert(source)
        if not isinstance(shape.shape, PairShape):
            raise ValueError(keys.NO_PREFERENCE)  # noqa: TRY004 (to callers every fault of a row is one kind)
        return Pair.model_validate(fields)
    except ValidationError as error:
        where, reason = _locate(error, len(fields["messages"]), shape.used)
        raise invalid(role, source.name, reason, where) from None
    except ValueError as error:
        raise invalid(role, source.name, str(error)) from None


def _locate(error: ValidationError, count: int, used: Mapping[str, str]) -> tuple[str, str]:
    """Like `reasons.locate`, but names the answers by their keys in the row."""
    first = error.errors()[0]
    loc = first["loc"]
    if loc[:2] == ("messages", count - 1):
        first["loc"] = (used["preferred"], *loc[2:])
    elif loc[:1] == ("dispreferred",):
        first["loc"] = (used["dispreferred"], *loc[1:])
    return reasons.locate(first)
