"""From a line of a file to what the model learns: parse, split, encode, every fault under its line's number."""

from tunery.errors import CannotRender
from tunery.rendering.messages import Example, FileRole, invalid, parse_line
from tunery.rendering.template import ChatTemplate, Rendered


def encode_line(
    template: ChatTemplate, text: str, line_number: int, *, max_length: int, role: FileRole = "training"
) -> list[Rendered]:
    """The sequences of one line: one, or one for each answer where the template shows earlier answers differently.

    Raises InvalidTrainingFile, naming the line. A sequence may have no trained token left (`trained_tokens == 0`).
    """
    return encode_example(template, parse_line(text, line_number, role), line_number, max_length=max_length, role=role)


def encode_example(
    template: ChatTemplate, example: Example, line_number: int, *, max_length: int, role: FileRole = "training"
) -> list[Rendered]:
    """As `encode_line`, for a line that has been parsed."""
    try:
        return [template.encode(part, max_length) for part in template.split(example)]
    except CannotRender as error:
        raise invalid(role, line_number, error.message) from error
