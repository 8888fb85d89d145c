"""From one row to what the model learns of it, every fault under its line's number."""

from tunery.errors import CannotRender
from tunery.rows.messages import Example, FileRole, invalid
from tunery.rows.template import ChatTemplate, Rendered


def encode_example(
    template: ChatTemplate, example: Example, line_number: int, *, max_length: int, role: FileRole = "training"
) -> list[Rendered]:
    """The sequences of one row: one, or one for each answer where the template shows earlier answers differently.

    Raises InvalidTrainingFile, naming the line. A sequence may have no trained token left (`trained_tokens == 0`).
    """
    try:
        return [template.encode(part, max_length) for part in template.split(example)]
    except CannotRender as error:
        raise invalid(role, line_number, error.message) from error
