"""Examples of a large file: tokens and labels in a temporary file, a few numbers of each row in memory.

Rows are read when a batch asks for their tokens. Not mapped into memory: a mapping that is read from its start to its
end counts as this process's memory, by which containers are killed.
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
from typing import IO, TypeVar, overload

import numpy

from worker.trainer.blocks import Block
from worker.trainer.row import Example, Row
from worker.trainer.whole_folders import room_for

T = TypeVar("T")

_ID = numpy.dtype("<i4")


class StoredRow(Row):
    """A row whose tokens are read when they are asked for. Its length and its number of labels are known."""

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
        """As counted when the row was stored."""
        store, number = self._of
        return store.labelled[number]

    @property
    def _of(self) -> "tuple[Store, int]":
        found: tuple[Store, int] = self.__dict__["_place"]
        return found


class Store:
    """Rows in a file that nobody else sees, and that goes with the process. Not safe to fork while it is written."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the rows)
        weakref.finalize(self, _close, self._file)
        self._ends = array("q", [0])
        self.labelled = array("l")
        self.example_ends = array("q", [0])
        """How many rows stand in the examples up to each."""
        self.reference = array("d")

    def add(self, block: Block) -> None:
        """Writes a block's examples behind the others."""
        self._file.write(block.data)
        self._ends.extend(islice(accumulate(block.lengths, initial=self._ends[-1]), 1, None))
        self.labelled.extend(block.labelled)
        self.example_ends.extend(islice(accumulate(block.rows, initial=self.example_ends[-1]), 1, None))

    def flush(self) -> None:
        """To be called before the first row is read."""
        self._file.flush()

    def length(self, number: int) -> int:
        """The tokens of a row."""
        return self._ends[number + 1] - self._ends[number]

    @property
    def example_lengths(self) -> "array[int]":
        """The tokens of each example."""
        ends = array("q", map(self._ends.__getitem__, self.example_ends))
        return array("l", map(sub, islice(ends, 1, None), ends))

    def read(self, number: int, part: int) -> list[int]:
        """The ids (part 0) or labels (part 1) of a row."""
        size = self.length(number) * _ID.itemsize
        start = self._ends[number] * 2 * _ID.itemsize + part * size
        data = os.pread(self._file.fileno(), size, start)
        found: list[int] = numpy.frombuffer(data, dtype=_ID).tolist()
        return found

    def example(self, number: int) -> Example:
        """One of the examples, in the order in which they were added."""
        first, last = self.example_ends[number], self.example_ends[number + 1]
        rows = tuple(StoredRow(self, place) for place in range(first, last))
        return Example(rows, tuple(self.reference[first:last]))


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # of what a full disk did not take, which was said when it was written
        file.close()


class _Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

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
    """The store's examples, and some in memory behind them."""

    def __init__(self, store: Store, more: Sequence[Example] = ()) -> None:
        self._store, self._more = store, list(more)
        self._stored = len(store.example_ends) - 1
        super().__init__(self._stored + len(self._more), self._at)

    def __add__(self, more: Sequence[Example]) -> "StoredExamples":
        return StoredExamples(self._store, [*self._more, *more])

    def _at(self, place: int) -> Example:
        return self._store.example(place) if place < self._stored else self._more[place - self._stored]

    @property
    def lengths(self) -> "array[int]":
        """The tokens of each example."""
        return self._store.example_lengths + array("l", map(len, self._more))

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of all examples, one behind the other."""
        stored = len(self._store.labelled)
        more = [row for example in self._more for row in example.rows]
        return _Lazy(
            stored + len(more),
            lambda place: StoredRow(self._store, place) if place < stored else more[place - stored],
        )

    def attach(self, numbers: Iterable[Sequence[float]]) -> None:
        """Gives each example its `reference`."""
        assert not self._more, "replay has no reference"
        self._store.reference = array("d", (number for each in numbers for number in each))


def keep(blocks: Iterable[Block], folder: Path, most_in_memory: int) -> "list[Example] | StoredExamples":
    """The blocks' examples: in a list up to so many tokens, above that in a file in `folder`. Raises DiskFull."""
    held: list[Block] = []
    tokens, coming = 0, iter(blocks)
    for block in coming:
        held.append(block)
        tokens += block.tokens
        if tokens > most_in_memory:
            with room_for("a file's tokens", folder, folder / ".tokens"):
                return _store(chain(_let_go(held), coming), folder)
    return [example for block in _let_go(held) for example in block.examples()]


def _let_go(held: list[Block]) -> Iterator[Block]:
    """Each block, which is then held here no longer."""
    held.reverse()
    while held:
        yield held.pop()


def _store(blocks: Iterable[Block], folder: Path) -> StoredExamples:
    store = Store(folder)
    for block in blocks:
        store.add(block)
    store.flush()
    return StoredExamples(store)
