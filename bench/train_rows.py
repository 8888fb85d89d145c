"""The rows of the speed measurements: random tokens, all of them labelled, the same for every trainer."""

import random

from worker.trainer.data import Row, order

SEED = 0


def rows(count: int, length: int) -> list[Row]:
    """`count` rows of `length` tokens, every token to be learnt."""
    numbers = random.Random(SEED)
    made = ([numbers.randrange(10, 500) for _ in range(length)] for _ in range(count))
    return [Row(ids, ids) for ids in made]


def in_order(made: list[Row]) -> list[list[int]]:
    """The rows' tokens in the order in which Tunery's first epoch sees them."""
    return [made[i].input_ids for i in order(len(made), SEED, 0)]
