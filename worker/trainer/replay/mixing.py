"""Selects a step's examples when general rows are mixed in: those it has without them, and some of replay's.

Replay is spread evenly over the steps, so that every part of a run has some. The choice is a pure function of the seed
and the step, like the order of the task's examples.
"""

import math
from dataclasses import replace

from worker.trainer.data import Example, Rows, order, rows_of_step, steps_per_epoch

_ORDER = 1_000_002
"""Used in place of an epoch's number, and larger than any: replay has its own order."""


def wanted_an_epoch(fraction: float, count: int) -> int:
    """Returns how many replay rows give an epoch of `count` examples this share; at least one."""
    return max(1, round(count * fraction / (1 - fraction)))


def mix(rows: Rows, replay: list[Example], fraction: float) -> Rows:
    """Appends replay to the rows. An epoch has no replay example twice, so a short list gives a smaller share."""
    an_epoch = min(len(replay), wanted_an_epoch(fraction, rows.count))
    return replace(
        rows, examples=rows.examples + replay, replayed=len(replay) if an_epoch else 0, replayed_an_epoch=an_epoch
    )


def most_of_a_step(rows: Rows, batch_size: int) -> int:
    """Returns the number of examples in the largest step."""
    return batch_size + math.ceil(batch_size * rows.replayed_an_epoch / rows.count)


def examples_of_step(rows: Rows, step: int, batch_size: int, seed: int) -> list[int]:
    """Returns the indexes of a step's examples (steps counted from 1): `batch_size` of the task, then replay's."""
    count = rows.count
    drawn = rows_of_step(count, step, batch_size, seed)
    if not rows.replayed:
        return drawn
    epoch, place = divmod(step - 1, steps_per_epoch(count, batch_size))
    before = place * batch_size
    first, last = (
        epoch * rows.replayed_an_epoch + seen * rows.replayed_an_epoch // count
        for seen in (before, before + len(drawn))
    )
    # One order for all epochs: where it starts over, the examples of an epoch still differ from each other.
    places = order(rows.replayed, seed, _ORDER)
    return drawn + [count + places[i % rows.replayed] for i in range(first, last)]
