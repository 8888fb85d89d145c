"""A preview as it is stored and sent."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["trained", "masked", "cut"]


class _Sealed(BaseModel):
    model_config = ConfigDict(frozen=True)


class Token(_Sealed):
    """A token. Where several make one character, the last of them has its text and the others have none."""

    id: int
    text: str
    state: State = Field(description="trained: in the loss; masked: context only; cut: beyond the token limit")


class Sequence(_Sealed):
    """A sequence of tokens that the model gets of a row: one, or one for each answer or each side of a pair."""

    tokens: list[Token]
    trained: int
    masked: int
    cut: int
    omitted: int = Field(description="Tokens that are counted and checked, but not shown")


class PreviewRow(_Sealed):
    """A row of the file."""

    number: int = Field(description="As in reports: in JSON Lines and tables the line, else the place among the rows")
    line: int | None = Field(None, description="The line on which the row begins, if it differs from its number")
    name: str = Field("", description="The row's name in messages")
    sequences: list[Sequence] = []
    failed: list[str] = Field([], description="Names of the failed checks")
    error: str | None = Field(None, description="Why the row cannot be used for training")


class Check(_Sealed):
    """A check of all rows that are shown."""

    name: str
    passed: bool
    what: str = Field(description="What the check requires")
    rows: list[int] = Field([], description="Rows that fail the check")

    advice: str | None = Field(None, description="What to change if it fails")


class Preview(_Sealed):
    """What a model learns of a file's first rows, and whether it learns the right tokens."""

    model: str
    chat_template_sha256: str
    max_tokens: int
    shape: str | None = Field(description="What the rows are, and what their columns become")
    rows: list[PreviewRow]
    checks: list[Check]
    passed: bool = Field(description="Whether every check passes")

    def where(self, check: Check) -> str:
        """Returns the names of the rows that fail a check."""
        return ", ".join(row.name for row in self.rows if row.number in check.rows)
