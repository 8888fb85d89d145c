"""What a base says of a file's answers: ordered by a worker or `tunery files report`, measured by the trainer, read by
the file's report."""

from pydantic import BaseModel, ConfigDict

MOST_PARAMS = 2_000_000_000
"""Parameters of the largest base that is run on a CPU: a larger one would get through a few rows only."""


class PlausibilityOrder(BaseModel):
    """What is to be measured: at most `most_rows` rows of at most `max_tokens`, for about `seconds`.

    `columns`: see `FileShape`. `ends_only`: the ends of the answers, without their losses.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int
    most_rows: int
    seconds: float
    columns: dict[str, str] = {}
    ends_only: bool = False


class AnswerEnd(BaseModel):
    """The end of one row's last answer. `end`: the log probability that the answer, a sentence or a line ends there;
    `goes_on`: the log odds that its last word goes on instead; None if the answer does not end with a letter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    line: int
    end: float
    goes_on: float | None = None


class AnswerLoss(AnswerEnd):
    """The losses of the answer too, of `tokens` tokens besides its end, as means in nats per token. `loss`: after its
    question; `alone`: after an empty question."""

    tokens: int
    loss: float
    alone: float
