"""Examples of a large file: tokens and labels in a temporary file, a few numbers of each row in memory.

Rows are read when a batch needs their tokens. The file is not memory-mapped: pages that were read would count as this
process's memory, for which containers are killed.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, islice
from operator import sub
from pathlib import Path
from typing import IO, Self, TypeVar, overload

import numpy

from worker.trainer.blocks import Block
from worker.trainer.row import Example, Row
from worker.trainer.whole_folders import room_for

T = TypeVar("T")

_ID = numpy.dtype("<i4")
_PIECE_BYTES = 2**20


class StoredRow(Row):
    """A row whose tokens are read when needed. Its length and its number of labels are known."""

    def __init__(self, store: "Store", number: int) -> None:
        self.__dict__["_place"] = store, number  # a row is frozen

    @property
    def input_ids(self) -> list[int]:
        """Read from the file each time."""
        store, number = self._of
        return store.read(number, part=0)

    @property
    def labels(self) -> list[int]:
        """Read from the file each time."""
        store, number = self._of
        return store.read(number, part=1)

    def __len__(self) -> int:
        store, number = self._of
        return store.length(number)

    @property
    def labelled(self) -> int:
        """The count from when the row was stored."""
        store, number = self._of
        return store.labelled[number]

    @property
    def _of(self) -> "tuple[Store, int]":
        found: tuple[Store, int] = self.__dict__["_place"]
        return found


class Store:
    """Rows in a file. Do not fork while it is being written."""

    def __init__(
        self,
        file: IO[bytes],
        ends: "array[int] | None" = None,
        labelled: "array[int] | None" = None,
        example_ends: "array[int] | None" = None,
    ) -> None:
        """Without the `numbers` of its rows, the file must be empty."""
        self._file = file
        weakref.finalize(self, _close, self._file)
        self._ends = ends or array("q", [0])
        self.labelled = labelled or array("q")
        self.example_ends = example_ends or array("q", [0])
        """The number of rows up to the end of each example."""
        self.reference = array("d")

    @classmethod
    def temporary(cls, folder: Path) -> Self:
        """Returns a store in a file that is visible to nobody else and removed with the process."""
        return cls(tempfile.TemporaryFile(dir=folder))

    @property
    def numbers(self) -> "tuple[array[int], array[int], array[int]]":
        """The data about rows that is in memory, without the reference."""
        return self._ends, self.labelled, self.example_ends

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self._ends[-1]

    @property
    def size(self) -> int:
        """Bytes of all rows in the file."""
        return self._ends[-1] * 2 * _ID.itemsize

    def pieces(self) -> Iterator[bytes]:
        """Yields the bytes of all rows."""
        for start in range(0, self.size, _PIECE_BYTES):
            yield os.pread(self._file.fileno(), min(_PIECE_BYTES, self.size - start), start)

    def add(self, block: Block) -> None:
        """Appends a block's examples."""
        self._file.write(block.data)
        self._ends.extend(islice(accumulate(block.lengths, initial=self._ends[-1]), 1, None))
        self.labelled.extend(block.labelled)
        self.example_ends.extend(islice(accumulate(block.rows, initial=self.example_ends[-1]), 1, None))

    def flush(self) -> None:
        """Call it before the first row is read."""
        self._file.flush()

    def length(self, number: int) -> int:
        """Returns the number of tokens of a row."""
        return self._ends[number + 1] - self._ends[number]

    @property
    def example_lengths(self) -> "array[int]":
        """The tokens of each example."""
        ends = array("q", map(self._ends.__getitem__, self.example_ends))
        return array("l", map(sub, islice(ends, 1, None), ends))

    def read(self, number: int, part: int) -> list[int]:
        """Returns the ids (part 0) or labels (part 1) of a row."""
        size = self.length(number) * _ID.itemsize
        start = self._ends[number] * 2 * _ID.itemsize + part * size
        data = os.pread(self._file.fileno(), size, start)
        found: list[int] = numpy.frombuffer(data, dtype=_ID).tolist()
        return found

    def example(self, number: int) -> Example:
        """Returns an example, by the order in which they were added."""
        first, last = self.example_ends[number], self.example_ends[number + 1]
        rows = tuple(StoredRow(self, place) for place in range(first, last))
        return Example(rows, tuple(self.reference[first:last]))


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # a full disk has already failed the write
        file.close()


class _Lazy(Sequence[T]):
    """A sequence whose items are created on access."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._make(each) for each in range(self._count)[place]]
        return self._make(range(self._count)[place])


class StoredExamples(_Lazy[Example]):
    """The store's examples, followed by some in memory."""

    def __init__(self, store: Store, more: Sequence[Example] = ()) -> None:
        self.store, self._more = store, list(more)
        self.stored = len(store.example_ends) - 1
        super().__init__(self.stored + len(self._more), self._at)

    def __add__(self, more: Sequence[Example]) -> "StoredExamples":
        return StoredExamples(self.store, [*self._more, *more])

    def _at(self, place: int) -> Example:
        return self.store.example(place) if place < self.stored else self._more[place - self.stored]

    @property
    def lengths(self) -> "array[int]":
        """The tokens of each example."""
        return self.store.example_lengths + array("l", map(len, self._more))

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of all examples, concatenated."""
        stored = len(self.store.labelled)
        more = [row for example in self._more for row in example.rows]
        return _Lazy(
            stored + len(more),
            lambda place: StoredRow(self.store, place) if place < stored else more[place - stored],
        )

    def attach(self, numbers: Iterable[Sequence[float]]) -> None:
        """Sets each example's `reference`."""
        assert not self._more, "replay has no reference"
        self.store.reference = array("d", (number for each in numbers for number in each))


def keep(blocks: Iterable[Block], folder: Path, most_in_memory: int) -> "list[Example] | StoredExamples":
    """Returns the blocks' examples: up to `most_in_memory` tokens in a list, else in a file in `folder`. Raises
    DiskFull.
    """
    held: list[Block] = []
    tokens, coming = 0, iter(blocks)
    for block in coming:
        held.append(block)
        tokens += block.tokens
        if tokens > most_in_memory:
            with room_for("a file's tokens", folder, folder / ".tokens"):
                return _store(chain(_let_go(held), coming), folder)
    return [example for block in _let_go(held) for example in block.examples()]


def store_of(examples: "list[Example] | StoredExamples", folder: Path) -> Store:
    """Returns the examples' store; for those in memory, a new one in `folder`."""
    if isinstance(examples, StoredExamples):
        return examples.store
    block = Block()
    for example in examples:
        block.add(example.rows)
    return _store([block], folder).store


def read_back(store: Store, most_in_memory: int) -> "list[Example] | StoredExamples":
    """Returns the store's examples: in a list up to `most_in_memory` tokens."""
    stored = StoredExamples(store)
    if store.tokens > most_in_memory:
        return stored
    return [Example(tuple(Row(row.input_ids, row.labels) for row in example.rows)) for example in stored]


def _let_go(held: list[Block]) -> Iterator[Block]:
    """Yields each block and drops the reference to it."""
    held.reverse()
    while held:
        yield held.pop()


def _store(blocks: Iterable[Block], folder: Path) -> StoredExamples:
    store = Store.temporary(folder)
    for block in blocks:
        store.add(block)
    store.flush()
    return StoredExamples(store)
