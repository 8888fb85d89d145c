"""Compares many texts by their shingles, the runs of a few characters that they have."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash
from scipy.sparse import csr_matrix

SHINGLE = 3
"""Characters of a shingle: user texts are short, and one changed word must leave most of them alike."""
_CHARACTERS = 2**20
"""Characters that are hashed at a time, and shingles that are compared at a time."""
_SKETCHED = 2000
_SEED = 7
_POINT, _HASH = np.uint64(21), np.uint64(31)
"""Bits of a Unicode code point, and of a column of the table."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
"""Odd, and its bits look random: the high bits of a product depend on all bits of the other factor."""


def table(texts: Sequence[str]) -> csr_matrix:
    """Returns a row for each text, in which the columns of its shingles are true. A column is a 31-bit hash, since a
    table of different shingles would not be bounded by the alphabet."""
    counts, columns = np.zeros(len(texts), np.int64), [np.empty(0, np.int32)]
    for batch in _batches(texts):
        keys = np.sort(_hashes(batch))
        keys = keys[np.append(True, keys[1:] != keys[:-1])]  # np.unique takes 30 times as long, by hashing them
        counts += np.bincount((keys >> _HASH).astype(np.int64), minlength=len(texts))
        columns.append((keys & np.uint64(2**31 - 1)).astype(np.int32))
    ends = np.concatenate([[0], np.cumsum(counts)])
    indices = np.concatenate(columns)
    made = csr_matrix((np.ones(len(indices), bool), indices, ends), shape=(len(texts), 2**31 - 1))
    made.sum_duplicates()  # of texts that are in two batches
    return made


def similarities(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Returns the Jaccard similarity of the shingles of each pair of texts, 0 to 1."""
    places: dict[str, int] = {}
    both = [(places.setdefault(one, len(places)), places.setdefault(other, len(places))) for one, other in pairs]
    found: list[float] = similarity(table(list(places)), *np.array(both, np.int64).reshape(-1, 2).T).tolist()
    return found


def sizes(of: csr_matrix) -> NDArray[np.int64]:
    """Returns how many different shingles each text has."""
    return np.asarray(np.diff(of.indptr), np.int64)


def similarity(of: csr_matrix, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the Jaccard similarity of pairs of texts, 0 to 1. `first`, `second`: their rows in the table."""
    counts = sizes(of)
    both = counts[first] + counts[second]
    # In parts, because the rows of a part's pairs are copied.
    part = np.cumsum(both) // _CHARACTERS
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    common = [
        np.diff(of[some].multiply(of[others]).tocsr().indptr)
        for some, others in zip(np.split(first, starts[1:]), np.split(second, starts[1:]), strict=True)
        if len(some)
    ]
    shared = np.concatenate([np.empty(0, np.int64), *common])
    return np.asarray(shared / (both - shared))


def sketches(of: csr_matrix, length: int) -> NDArray[np.uint16]:
    """Returns a MinHash sketch of each text: two texts agree in a share of its values that is about their similarity.

    Their low 16 bits are kept: others that agree by chance are one in 65,536.
    """
    made = np.empty((of.shape[0], length), np.uint16)
    for begin in range(0, of.shape[0], _SKETCHED):
        ends = of.indptr[begin : begin + _SKETCHED + 1]
        columns = of.indices[ends[0] : ends[-1]].astype(np.uint64)
        digests = RMinHash.digest_matrix_from_flat_token_hashes(
            columns, (ends - ends[0]).astype(np.uint64), length, _SEED
        )
        made[begin : begin + _SKETCHED] = np.array(digests.to_rows(), np.uint32).astype(np.uint16)
    return made


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Yields pieces of the texts with the texts' places, in order. Pieces of one text overlap, or their shingles would
    not be all of the text's."""
    batch, room = [], _CHARACTERS
    for place, text in enumerate(texts):
        for begin in range(0, max(1, len(text) - SHINGLE + 1), _CHARACTERS):
            piece = text[begin : begin + _CHARACTERS + SHINGLE - 1]
            batch.append((place, piece))
            room -= len(piece)
            if room <= 0:
                yield batch
                batch, room = [], _CHARACTERS
    if batch:
        yield batch


def _hashes(batch: Sequence[tuple[int, str]]) -> NDArray[np.uint64]:
    """Returns a number for each shingle of each text: the text's place, then the shingle's hash. A text that is shorter
    than a shingle is its own."""
    padding = "\0" * SHINGLE
    joined = "".join(chain.from_iterable((piece, padding) for _, piece in batch))
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(piece) for _, piece in batch])
    counts = np.maximum(1, lengths - SHINGLE + 1)
    begins = np.cumsum(lengths + SHINGLE) - lengths - SHINGLE
    at = np.arange(counts.sum()) + np.repeat(begins - np.cumsum(counts) + counts, counts)
    codes = points[at] | points[at + 1] << _POINT | points[at + 2] << (_POINT + _POINT)
    places = np.repeat(np.array([place for place, _ in batch], np.uint64), counts)
    return np.asarray(places << _HASH | (codes * _MIX) >> np.uint64(33))
