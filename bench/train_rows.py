"""The rows of the speed measurements: random tokens, all of them labelled, the same for every trainer."""

import random

from worker.trainer.data import Row, order

SEED = 0
LONGEST = 2048
SHORTEST = 31


def lengths(kind: str, count: int) -> list[int]:
    """Returns the lengths of `count` rows in tokens.

    `full`: LONGEST. `long`: 1,900 to 1,906. `real`: those of instruction data, log-normal with a median of 190.
    """
    numbers = random.Random(0)
    if kind == "full":
        return [LONGEST] * count
    if kind == "long":
        return [numbers.randrange(1900, 1907) for _ in range(count)]
    return [min(LONGEST, max(SHORTEST, int(numbers.lognormvariate(5.25, 0.75)))) for _ in range(count)]


def of_lengths(wanted: list[int]) -> list[Row]:
    """Returns rows of these lengths, every token to be learnt."""
    numbers = random.Random(SEED)
    made = ([numbers.randrange(10, 500) for _ in range(length)] for length in wanted)
    return [Row(ids, ids) for ids in made]


def rows(count: int, length: int) -> list[Row]:
    """Returns `count` rows of `length` tokens."""
    return of_lengths([length] * count)


def in_order(made: list[Row]) -> list[list[int]]:
    """Returns the rows' tokens in the order of Tunery's first epoch."""
    return [made[i].input_ids for i in order(len(made), SEED, 0)]
