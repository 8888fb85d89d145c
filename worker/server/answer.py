"""What the server requires of an answer in progress, for every back end."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tunery.rows.messages import FunctionCall

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class TokenChance:
    """A token's natural log probability by the model alone, before temperature, nucleus and grammar, and those of the
    likeliest tokens.
    """

    token: str
    logprob: float
    top: "tuple[TokenChance, ...]" = ()


class Answer(Protocol):
    """An answer in progress. Iterate once for its text, in pieces of any length; the counts grow meanwhile."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...

    @property
    def finish_reason(self) -> FinishReason | None:
        """None until the last piece has been read."""

    @property
    def tool_calls(self) -> Sequence[FunctionCall]:
        """The calls that the answer makes, known once the last piece has been read."""

    @property
    def chances(self) -> Sequence[TokenChance]:
        """The tokens of the pieces so far, if their log probabilities are requested."""

    def __iter__(self) -> Generator[str]: ...

    def close(self) -> None:
        """Frees what the answer holds. Called at least once, whether or not the answer has begun or is complete."""
