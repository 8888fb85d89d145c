"""Rows of similar length, which share forward passes and the length of their slots."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from worker.server.cache_memory import CacheMemory
from worker.server.slots import Slots
from worker.trainer.decoding.graphs import DecodeGraphs, Recorder
from worker.trainer.decoding.passes import Passes

if TYPE_CHECKING:
    from worker.server.batch import Row

WIDTH_STEP = 32
"""The width of a pass over prompts is a multiple of this: prompts that differ by less end in the same pass."""

NONE_LIKELY = -1
"""In place of a row's likeliest token, if its logits are not finite."""


@dataclass(frozen=True)
class Located:
    """Where the adapters are of rows that read one token each: for each of their shapes each row's address, int64 on
    the device; 0: the row has none of this shape.
    """

    shapes: tuple[Any, ...] = ()
    addresses: tuple[torch.Tensor, ...] = ()


class Adapters(Protocol):
    """Applies adapters to the rows of a pass."""

    def on(self, adapters: list[Any]) -> AbstractContextManager[None]:
        """Gives row i of each pass in the block adapters[i]; None: the base alone."""

    def locate(self, adapters: list[Any]) -> Located | None:
        """Returns where the rows' adapters are now; None: they can only be applied by `on`."""

    def at(self, located: Located) -> AbstractContextManager[None]:
        """Gives rows that read one token each the adapters at these addresses."""


class Lane:
    """The rows, in the order of their slots: first the `running` ones, then those whose prompts are being read."""

    def __init__(
        self, model: Any, adapters: Adapters | None, memory: CacheMemory, recorder: Recorder | None = None
    ) -> None:
        """`memory`: for what is worth keeping while nothing else needs it. `recorder`: records passes over one token
        of each row; None: no pass is recorded.
        """
        self._memory = memory
        self._graphs = None if recorder is None else DecodeGraphs(recorder, memory)
        self.slots = Slots(model)
        self._passes = Passes(model, self.slots)
        self.rows: list[Row] = []
        self.running = 0
        self._model = model
        self._adapters = adapters

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is not read to its end."""
        return self.running < len(self.rows)

    @property
    def is_due(self) -> bool:
        """Whether the logits after a running row's last token are not computed."""
        return any(row.best is None for row in self.rows[: self.running])

    def longest(self, *joining: "Row") -> int:
        """Returns the positions that the longest row needs in the next pass."""
        return max((len(row.ids) for row in (*self.rows, *joining)), default=0) + WIDTH_STEP

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' keys and values."""
        return self.slots.nbytes if self.rows else 0

    def size(self, *joining: "Row") -> int:
        """Returns the bytes of keys and values in the next pass."""
        count = len(self.rows) + len(joining)
        return self.slots.size(count, self.longest(*joining)) if count else 0

    def add(self, row: "Row") -> int:
        """Gives a row a slot and returns it."""
        self.rows.append(row)
        return self.slots.take(self.longest())

    def take_out(self, row: "Row") -> None:
        """Frees a row's slot; `rest` is called next."""
        if self.rows.index(row) < self.running:
            self.running -= 1
            self.move(row, self.running)
        self.move(row, len(self.rows) - 1)
        self.rows.pop()
        self.slots.drop()

    def rest(self) -> None:
        """Keeps the slots that recorded steps read for the next rows, as long as nothing else needs their memory."""
        if not self.rows:
            is_recorded = self._graphs is not None and self._graphs.any
            if not is_recorded or not self._memory.lend(self.slots, self.slots.nbytes, self.clear):
                self.clear()

    def wake(self) -> None:
        """Takes back the slots for rows that are about to join."""
        self._memory.release(self.slots)

    def clear(self) -> None:
        """Removes all rows, and frees all memory."""
        self._memory.release(self.slots)
        self.rows, self.running = [], 0
        self.slots.clear()
        if self._graphs is not None:
            self._graphs.clear()

    def move(self, row: "Row", slot: int) -> None:
        """Swaps a row with that of another slot."""
        own = self.rows.index(row)
        self.slots.swap(own, slot)
        self.rows[own], self.rows[slot] = self.rows[slot], row

    def read_prompts(self, most: int, *, padded: bool = False) -> int:
        """Reads equally many tokens of some prompts, at most `most` in all; returns how many.

        `padded`: as many as the longest prompt has, and not the shortest. That takes fewer passes and more work.
        """
        reading = sorted(self.rows[self.running :], key=lambda row: (row.unread, row.number), reverse=padded)
        longest, shortest = max(row.unread for row in reading), min(row.unread for row in reading)
        # Padded, the longest first, as all others would be padded to its length until it is read. Else the oldest takes
        # part in every pass, so that no number of shorter prompts delays it.
        first = reading[0] if padded else min(reading, key=lambda row: row.number)
        width = min(longest if padded else -(-shortest // WIDTH_STEP) * WIDTH_STEP, longest, most)
        room = self.longest()  # a pass writes as many positions of each row as it is wide
        others = [row for row in reading if row is not first and row.fed + width <= room]
        chosen = [first, *others[: max(most // width - 1, 0)]]
        results = self._pass([(row, min(row.unread, width)) for row in chosen], width)
        for row, (best, found) in zip(chosen, results, strict=True):
            row.fed += min(row.unread, width)
            if not row.unread:
                row.best, row.found = best, found
                self.move(row, self.running)
                self.running += 1
        return width * len(chosen)

    def advance(self) -> None:
        """Computes the logits after the last token of each running row."""
        rows = self.rows[: self.running]
        # A row whose reader is slow is computed again with the others, at the same position.
        results = self._pass([(row, 1) for row in rows], 1)
        for row, (best, found) in zip(rows, results, strict=True):
            if row.best is None:
                row.fed, row.best, row.found = len(row.ids), best, found

    def _pass(self, rows: "list[tuple[Row, int]]", width: int) -> list[tuple[int, torch.Tensor | None]]:
        """Returns for each row the likeliest token after that many more tokens, and the logits unless the row is
        greedy.
        """
        placed = [_tokens(row, tokens, width) for row, tokens in rows]
        slots = [self.rows.index(row) for row, _ in rows]
        self.slots.fit(self.longest())
        ids = torch.tensor([ids for ids, _ in placed], device=self._model.device)
        places = [places for _, places in placed]
        adapters, graphs = [row.adapter for row, _ in rows], self._graphs
        located = self._locate(adapters) if width == 1 else None
        is_recordable = located is not None and slots == list(range(len(rows)))
        if located is not None and is_recordable and graphs is not None and not graphs.is_broken:
            logits = self._by_graph(graphs, located, ids, places)
        else:
            with self._laying(adapters, located):
                logits = self._passes.read(ids, self.slots.place(slots, places))
        return _results(logits, [row.is_greedy for row, _ in rows])

    def _by_graph(
        self, graphs: DecodeGraphs, located: Located, ids: torch.Tensor, places: list[list[int]]
    ) -> torch.Tensor:
        """Returns the logits of a pass in which each of the first rows reads one token."""
        reach = self.slots.reach(max(map(max, places)) + 1)
        positions = torch.tensor(places, device=ids.device)

        def work(tokens: torch.Tensor, positions: torch.Tensor, *addresses: torch.Tensor) -> torch.Tensor:
            with self._laying([], Located(located.shapes, addresses)):
                return self._passes.step(tokens, positions, reach)

        kind = len(places), reach, located.shapes
        return graphs.logits(self.slots.version, kind, (ids, positions, *located.addresses), work)

    def _locate(self, adapters: list[Any]) -> Located | None:
        return Located() if self._adapters is None else self._adapters.locate(adapters)

    def _laying(self, adapters: list[Any], located: Located | None) -> AbstractContextManager[None]:
        if self._adapters is None:
            return nullcontext()
        return self._adapters.on(adapters) if located is None else self._adapters.at(located)


def _results(logits: torch.Tensor, is_greedy: list[bool]) -> list[tuple[int, torch.Tensor | None]]:
    """Returns what rows need of logits on the device, moved to the CPU: the likeliest token, or NONE_LIKELY, and the
    logits. Waits for the device once or twice in all.
    """
    best = logits.argmax(dim=-1, keepdim=True)
    best = best.masked_fill(~logits.gather(-1, best).isfinite(), NONE_LIKELY)[:, 0]
    others = [i for i, one in enumerate(is_greedy) if not one]
    found = dict(zip(others, logits[others].float().cpu(), strict=True)) if others else {}
    return [(token, found.get(i)) for i, token in enumerate(best.tolist())]


def _tokens(row: "Row", tokens: int, width: int) -> tuple[list[int], list[int]]:
    """Returns the next tokens of a row and their positions, padded on the left.

    On the left, so that the last token is last in every row. Padding gets positions after all tokens, where no token
    attends to it and the next token overwrites it.
    """
    start = min(row.fed, len(row.ids) - 1)
    ids, end = row.ids[start : start + tokens], row.fed + tokens
    more = width - tokens
    return ids[:1] * more + ids, [*range(end, end + more), *range(row.fed, end)]
