"""A base's losses on a file's answers: ordered by a worker, measured by the trainer, read by the file's report."""

from pydantic import BaseModel, ConfigDict


class PlausibilityOrder(BaseModel):
    """What is to be measured: at most `most_rows` rows of at most `max_tokens`, for about `seconds`.

    `columns`: see `FileShape`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int
    most_rows: int
    seconds: float
    columns: dict[str, str] = {}


class AnswerLoss(BaseModel):
    """The losses of one row's last answer, of `tokens` tokens besides its end, as means in nats per token.

    `loss`: after its question; `alone`: after an empty question; `end`: the log probability that the answer ends where
    it does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    line: int
    tokens: int
    loss: float
    alone: float
    end: float
