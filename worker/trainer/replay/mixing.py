"""Which examples a step takes where general rows are mixed in: those that it takes without them, and some of replay.

Replay is spread evenly over the steps, so that every part of a run has its share. It is a pure function of the seed and
the step, as the order of the task's examples is.
"""

import math
from dataclasses import replace

from worker.trainer.data import Example, Rows, order, rows_of_step, steps_per_epoch

_ORDER = 1_000_002
"""In the place of an epoch, of which there are fewer: the order of replay is none of the task's."""


def wanted_an_epoch(fraction: float, count: int) -> int:
    """Returns the replay rows of which an epoch of `count` examples holds that share; at least one."""
    return max(1, round(count * fraction / (1 - fraction)))


def mix(rows: Rows, replay: list[Example], fraction: float) -> Rows:
    """The rows with replay behind them. An epoch has no example of replay twice, so a short list reaches less."""
    an_epoch = min(len(replay), wanted_an_epoch(fraction, rows.count))
    return replace(
        rows, examples=rows.examples + replay, replayed=len(replay) if an_epoch else 0, replayed_an_epoch=an_epoch
    )


def most_of_a_step(rows: Rows, batch_size: int) -> int:
    """Returns the examples of the largest step."""
    return batch_size + math.ceil(batch_size * rows.replayed_an_epoch / rows.count)


def examples_of_step(rows: Rows, step: int, batch_size: int, seed: int) -> list[int]:
    """Indexes of the examples of a step (counted from 1): `batch_size` of the task, and behind them replay's."""
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
    # One order for all epochs: where it begins again, the examples of an epoch still differ from each other.
    places = order(rows.replayed, seed, _ORDER)
    return drawn + [count + places[i % rows.replayed] for i in range(first, last)]
