"""Defines how the tokens of an answer are chosen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. `temperature` 0: the likeliest. `seed` None: a new seed for each answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0 or self.top_p == 0
