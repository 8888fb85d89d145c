"""Finds texts that are probably similar, by locality-sensitive hashing of their sketches, in bounded time.

Texts whose sketches agree in a whole band form a run. Each text of a run is paired with the run's first ones alone, as
the pairs of a run are as many as the square of its texts. A text that all have in common makes large runs of some
bands, but texts that have more in common agree in other bands too.
"""

import numpy as np
from numpy.typing import NDArray

LENGTH = 240
"""Values of a sketch."""
_BANDS = 40  # of six values: texts with a similarity of 0.7 agree in one of them with a probability of 0.993
_LIKELY = 0.63
"""Least share of equal values, which texts with a similarity of 0.7 have with a probability of 0.998."""
_FIRST = 5
"""Maximum texts of a run that its others are paired with."""
_ENOUGH = 40
"""Candidates of a text after which no more are looked for."""
_COMPARED = 20_000
"""Sketches that are compared at a time."""
_MIX = np.uint64(0x9E3779B97F4A7C15)

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def find(
    sketches: NDArray[np.uint16], groups: NDArray[np.int64], sought: NDArray[np.bool_], seeking: NDArray[np.bool_]
) -> Pairs:
    """Returns pairs of probably similar texts of the same group, each once, by index: texts that are `sought`, and the
    texts that are `seeking`. Of two that are both, the earlier one is sought."""
    if not sought.any() or not seeking.any():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    keys = _band_keys(sketches, groups)
    count = len(sketches)
    found = np.empty(0, np.int64)
    for band in range(_BANDS):
        enough = np.bincount(found % count, minlength=count) >= _ENOUGH
        one, other = _in_runs(keys[:, band], sought, seeking & ~enough)
        new = _without(np.sort(one * count + other), found)
        likely = new[likeness(sketches, new // count, new % count) >= _LIKELY]
        found = np.insert(found, np.searchsorted(found, likely), likely)
    return found // count, found % count


def _without(new: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the different ones of the sorted `new` that are not in the sorted `known`."""
    new = new[np.append(True, new[1:] != new[:-1])[: len(new)]]
    is_known = np.append(known, -1)[np.searchsorted(known, new)] == new
    return np.asarray(new[~is_known])


def _band_keys(sketches: NDArray[np.uint16], groups: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns a number for each band of each text, which texts of the same group with equal values there share."""
    bands = sketches.reshape(len(sketches), _BANDS, -1)
    keys = np.repeat(groups.astype(np.uint64)[:, None], _BANDS, axis=1)
    for value in range(bands.shape[2]):
        keys = (keys ^ bands[:, :, value]) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys


def _in_runs(keys: NDArray[np.uint64], sought: NDArray[np.bool_], seeking: NDArray[np.bool_]) -> Pairs:
    """Returns the texts that are sought, of the first ones of each run of equal keys, with those that are seeking."""
    texts = np.flatnonzero(sought | seeking)
    # The first ones of a run are those that are sought, in their order.
    texts = texts[np.lexsort((~sought[texts], keys[texts]))]
    ordered = keys[texts]
    starts = np.searchsorted(ordered, ordered)
    firsts = starts + np.arange(_FIRST)[:, None]
    step, place = np.nonzero(firsts < np.arange(len(texts)))
    one, other = texts[firsts[step, place]], texts[place]
    fine = sought[one] & seeking[other]
    return one[fine], other[fine]


def likeness(sketches: NDArray[np.uint16], one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the share of values in which the sketches of each pair agree: about the similarity of its texts."""
    parts = [slice(begin, begin + _COMPARED) for begin in range(0, len(one), _COMPARED)]
    shares = [(sketches[one[part]] == sketches[other[part]]).mean(axis=1) for part in parts]
    return np.concatenate([np.empty(0), *shares])
