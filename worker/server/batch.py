"""Continuous batching: running answers on one base share its forward passes, and join and leave between passes.

Prompts are read in separate passes, several at once and a bounded number of tokens between two steps, so that a long
prompt delays neither the running rows nor a short prompt behind it. Where nobody waits for a running row, all prompts
are read first: fewer passes, and the rows take all their steps together.
"""

import sys
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from threading import Lock
from typing import Any

import torch

from worker.server.cache_memory import WORTH, CacheMemory, Owner, common
from worker.server.lane import NONE_LIKELY, WIDTH_STEP, Adapters, Lane
from worker.server.slots import Parts
from worker.server.streams import NoProbabilities
from worker.trainer import grouped_attention
from worker.trainer.decoding import decoder, passes
from worker.trainer.decoding.graphs import Recorder

PROMPT_TOKENS = 512
"""Prompt tokens read between two steps of the running rows, unless prompts are read first."""
_MANY = 16
"""Rows that share passes, of which a long one is the cost."""
_LONG = 1024
"""The fewest tokens of rows that share no passes with shorter ones."""


class Row:
    """One answer's stream in a batch. The model has read `ids[:fed]`."""

    def __init__(self, batch: "Batch", prompt_ids: list[int], owner: Owner, number: int, is_greedy: bool) -> None:
        """`number`: the higher, the younger the row. `is_greedy`: only `likeliest` is read."""
        self.batch = batch
        self.owner = owner
        self.number = number
        self.is_greedy = is_greedy
        self.ids = list(prompt_ids)
        self.fed = 0
        self.lane: Lane | None = None
        self.reused: int | None = None
        self.best: int | None = None
        self.found: torch.Tensor | None = None
        self.failure: Exception | None = None

    @property
    def adapter(self) -> Any:
        return self.owner.adapter

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose keys and values were reused."""
        return self.reused or 0

    @property
    def unread(self) -> int:
        """How many tokens the model has not read yet."""
        return len(self.ids) - self.fed

    @property
    def is_ready(self) -> bool:
        """Whether `logits` and `likeliest` can be read without computing anything."""
        return self.best is not None or self.failure is not None

    def likeliest(self) -> int:
        """Returns the likeliest next token. Raises NoProbabilities, and the error that a pass of the batch failed
        with.
        """
        while self.best is None:
            if self.failure is not None:
                raise self.failure
            self.batch.step()
        if self.best == NONE_LIKELY:
            raise NoProbabilities
        return self.best

    def logits(self) -> torch.Tensor:
        """Returns the next token's logits (vocabulary, fp32, on the CPU). Raises as `likeliest` does."""
        self.likeliest()
        assert self.found is not None, "the row is greedy"
        return self.found

    def push(self, token: int) -> None:
        self.ids.append(token)
        self.best = self.found = None

    def close(self) -> None:
        self.batch.remove(self)


class Batch:
    """The rows of one base. All methods but `join` are called by the thread that steps.

    Rows that are far longer than the others share no passes with them: in a pass all rows' keys have the longest row's
    length.
    """

    def __init__(
        self,
        model: Any,
        adapters: Adapters | None = None,
        memory: CacheMemory | None = None,
        *,
        long_tokens: int | None = None,
        recorder: Callable[[], Recorder] | None = None,
        prompts_first: bool = False,
    ) -> None:
        """`memory`: for keys and values. One row of each batch runs even if there is none left. `long_tokens`: rows
        longer than this have passes of their own; by default as many as make such a pass the cheaper way.
        `recorder`: makes what records the passes; None: none is recorded. `prompts_first`: running rows wait until all
        prompts for which there is room are read.
        """
        grouped_attention.use(model)
        self._model = model
        self._recorder = recorder
        self._adapters = adapters
        self.memory = memory or CacheMemory(4 * 2**30)
        self._lanes = {0: self._new_lane()}
        self._long_tokens = long_tokens or self._cheaper_alone()
        self._prompts_first = prompts_first
        has_room = prompts_first and passes.is_plain(model)  # other attention writes the scores of all pairs of tokens
        self._tokens_a_pass = decoder.PROMPT_TOKENS[model.device.type] if has_room else PROMPT_TOKENS
        self._tokens_a_step = sys.maxsize if prompts_first else PROMPT_TOKENS
        self._joining: deque[Row] = deque()
        self._numbers = count()
        self._lock = Lock()

    @property
    def rows(self) -> list[Row]:
        """The rows that have slots."""
        return [row for lane in self._lanes.values() for row in lane.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' keys and values."""
        return sum(lane.nbytes for lane in self._lanes.values())

    @property
    def bytes_a_position(self) -> int:
        """Bytes of one token's keys and values."""
        return self._lanes[0].slots.bytes_a_position

    @property
    def longest(self) -> int:
        """The most tokens of a row for which the memory has room."""
        return self._lanes[0].slots.most(self.memory.limit) - WIDTH_STEP

    def join(
        self, prompt_ids: list[int], adapter: Any = None, project_id: str | None = None, *, is_greedy: bool = False
    ) -> Row:
        """Adds a row, which starts at the next step. Rows of one project and adapter share the keys of equal
        beginnings.
        """
        with self._lock:
            row = Row(self, prompt_ids, Owner(self, adapter, project_id), next(self._numbers), is_greedy)
            self._joining.append(row)
        return row

    @torch.inference_mode()
    def remove(self, row: Row) -> None:
        """Removes a row, if it is still there, and frees its keys and values."""
        with self._lock:
            if row in self._joining:
                self._joining.remove(row)
        if (lane := row.lane) is not None:
            try:
                self._keep(row, lane)
            finally:
                self._take_out(row, lane)

    def _keep(self, row: Row, lane: Lane) -> None:
        slot, length = lane.rows.index(row), row.fed
        nbytes = length * self.bytes_a_position
        with suppress(torch.OutOfMemoryError):  # a copy that only saves time later costs no answer
            self.memory.keep(row.owner, row.ids[:length], lambda: lane.slots.save(slot, length), nbytes)

    def _take_out(self, row: Row, lane: Lane) -> None:
        """Frees a row's slot."""
        lane.take_out(row)
        row.lane = None
        self.memory.reserve(self, self.nbytes, must=True)
        lane.rest()

    def fail(self, error: Exception) -> None:
        """Removes all rows and passes the error to their readers."""
        with self._lock:
            rows = [*self.rows, *self._joining]
            self._joining.clear()
        self.clear()
        self.memory.reserve(self, 0, must=True)
        for row in rows:
            row.failure, row.best, row.found, row.lane = error, None, None, None

    def clear(self) -> None:
        """Frees the memory of all rows, and of what is kept for the next ones."""
        for lane in self._lanes.values():
            lane.clear()

    @torch.inference_mode()
    def step(self) -> None:
        """Reads prompts of joining rows, and computes the logits after each running row's last token."""
        self._read_prompts()
        if any(lane.is_due for lane in self._lanes.values()):
            self._make_room()
        for lane in self._lanes.values():
            if lane.is_due:  # now: the last row of a lane may have left for others
                lane.advance()

    def _read_prompts(self) -> None:
        read: Counter[Lane] = Counter()
        while (left := self._tokens_a_step - read.total()) > 0:
            self._admit()
            reading = [lane for lane in self._lanes.values() if lane.is_reading]
            if not reading:
                return
            lane = min(reading, key=lambda lane: read[lane])  # none waits for the prompts of another
            most = min(left, self._tokens_a_pass // len(reading))
            read[lane] += lane.read_prompts(most, padded=self._prompts_first)

    def _admit(self) -> None:
        """Gives slots to joining rows, as long as there is memory for all."""
        while (row := self._next_to_join()) is not None and self._fits(lane := self._lane_for(row), row):
            with self._lock:
                self._joining.remove(row)
            parts, row.fed = self._known(row)
            row.lane, slot = lane, lane.add(row)
            if row.fed:
                lane.slots.load(slot, parts, row.fed)
            if row.reused is None:
                row.reused = row.fed

    def _new_lane(self) -> Lane:
        return Lane(self._model, self._adapters, self.memory, None if self._recorder is None else self._recorder())

    def _lane_for(self, row: Row) -> Lane:
        """Returns the lane for rows of this length: each is for rows up to four times as long as the one before."""
        number, length = 0, self._long_tokens
        while len(row.ids) > length:
            number, length = number + 1, 4 * length
        if number not in self._lanes:
            self._lanes[number] = self._new_lane()
        return self._lanes[number]

    def _cheaper_alone(self) -> int:
        """Returns the length from which reading the weights once more takes less than reading keys of this length for
        all rows.
        """
        weights: int = sum(part.nbytes for part in self._model.parameters())
        return max(weights // (_MANY * self.bytes_a_position), _LONG)

    def _next_to_join(self) -> Row | None:
        """Returns the first joining row that need not wait for another row whose keys it could reuse once they are
        read.
        """
        with self._lock:
            joining = list(self._joining)
        rows = self.rows
        return next((row for row in joining if not any(self._reads_for(one, row) for one in rows)), None)

    def _reads_for(self, one: Row, other: Row) -> bool:
        if one.unread <= 1 or not one.owner.is_same(other.owner):
            return False
        return common(one.ids, other.ids[:-1]) >= one.fed + WORTH

    def _known(self, row: Row) -> tuple[Parts, int]:
        """Returns reusable keys and values of the row's first tokens, from a running or ended row, and how many these
        are.
        """
        wanted = row.ids[:-1]  # the last one is always read, for its logits
        kept, length = self.memory.find(row.owner, wanted)
        for one in self.rows:
            if one.owner.is_same(row.owner):
                shared = common(one.ids[: one.fed], wanted)
                if shared >= max(WORTH, length + 1) and (lane := one.lane) is not None:
                    kept, length = lane.slots.save(lane.rows.index(one), shared), shared
        return kept, length

    def _make_room(self) -> None:
        """Puts the youngest rows back in the queue, to be read again later, until the others fit into memory."""
        while (rows := self.rows) and not self._fits(None):
            row = max(rows, key=lambda row: row.number)
            assert row.lane is not None
            self._take_out(row, row.lane)
            with self._lock:
                self._joining.appendleft(row)

    def _fits(self, joined: Lane | None, *joining: Row) -> bool:
        """Whether there is memory for the next pass of each lane, with the rows that join one of them."""
        if joined is not None:
            joined.wake()
        nbytes = sum(lane.size(*(joining if lane is joined else ())) for lane in self._lanes.values())
        fits = self.memory.reserve(self, nbytes, must=len(self.rows) + len(joining) == 1)
        if joined is not None and not fits:
            joined.rest()
        return fits
