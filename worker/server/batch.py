"""Continuous batching: running answers on one base share its forward passes, and join and leave between passes.

Prompts are read in separate passes, several at once and a bounded number of tokens between two steps, so that a long
prompt delays neither the running rows nor a short prompt behind it.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from threading import Lock
from typing import Any, Protocol

import torch

from worker.server.cache_memory import WORTH, CacheMemory, Owner, common
from worker.server.slots import Parts, Slots
from worker.trainer import rope

PROMPT_TOKENS = 512
"""Prompt tokens read between two steps of the running rows."""
_GRAIN = 32
"""Prompts whose lengths differ by less than this are read to their ends in one pass."""

_BY_LAYER = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "cohere2", "gpt_oss"})
_ONE_MASK = frozenset({"llama", "mistral", "mixtral", "qwen3_moe", "phi", "phi3", "granite"})


def can_batch(model: Any) -> bool:
    """Whether rows of different lengths may share the model's passes: only models known to use given masks and
    positions.
    """
    return model.config.model_type in _BY_LAYER | _ONE_MASK and not rope.of(model)


class Adapters(Protocol):
    """Applies adapters to the rows of a pass."""

    def on(self, adapters: list[Any]) -> AbstractContextManager[None]:
        """Gives row i of each pass in the block adapters[i]; None: the base alone."""


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
        """Returns the likeliest next token. Raises the error that a pass of the batch failed with."""
        while self.best is None:
            if self.failure is not None:
                raise self.failure
            self.batch.step()
        return self.best

    def logits(self) -> torch.Tensor:
        """Returns the next token's logits (vocabulary, fp32, on the CPU). Raises the error that a pass of the batch
        failed with.
        """
        self.likeliest()
        assert self.found is not None, "the row is greedy"
        return self.found

    def push(self, token: int) -> None:
        self.ids.append(token)
        self.best = self.found = None

    def close(self) -> None:
        self.batch.remove(self)


class Batch:
    """The rows of one base. All methods but `join` are called by the thread that steps."""

    def __init__(self, model: Any, adapters: Adapters | None = None, memory: CacheMemory | None = None) -> None:
        """`memory`: for keys and values. One row of each batch runs even if there is none left."""
        self._model = model
        self._adapters = adapters
        self.memory = memory or CacheMemory(4 * 2**30)
        self._slots = Slots(model)
        self._rows: list[Row] = []  # in the order of their slots: running rows, then those whose prompts are being read
        self._running = 0
        self._joining: deque[Row] = deque()
        self._numbers = count()
        self._lock = Lock()

    @property
    def longest(self) -> int:
        """The most tokens of a row for which the memory has room."""
        return self._slots.most(self.memory.limit) - _GRAIN

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
        if row in self._rows:
            try:
                self._keep(row)
            finally:
                self._take_out(row)

    def _keep(self, row: Row) -> None:
        slot, length = self._rows.index(row), row.fed
        nbytes = length * self._slots.bytes_a_position
        with suppress(torch.OutOfMemoryError):  # a copy that only saves time later costs no answer
            self.memory.keep(row.owner, row.ids[:length], lambda: self._slots.save(slot, length), nbytes)

    def _take_out(self, row: Row) -> None:
        """Frees a row's slot."""
        if self._rows.index(row) < self._running:
            self._running -= 1
            self._move(row, self._running)
        self._move(row, len(self._rows) - 1)
        self._rows.pop()
        self._slots.drop()
        self.memory.reserve(self, self._slots.nbytes, must=True)

    def fail(self, error: Exception) -> None:
        """Removes all rows and passes the error to their readers."""
        with self._lock:
            rows, self._rows, self._running = [*self._rows, *self._joining], [], 0
            self._joining.clear()
        self._slots.clear()
        self.memory.reserve(self, 0, must=True)
        for row in rows:
            row.failure, row.best, row.found = error, None, None

    @torch.inference_mode()
    def step(self) -> None:
        """Reads prompts of joining rows, and computes the logits after each running row's last token."""
        left = PROMPT_TOKENS
        while left > 0:
            self._admit()
            if self._running == len(self._rows):
                break
            left -= self._read_prompts(left)
        if any(row.best is None for row in self._rows[: self._running]):
            self._make_room()
            self._advance()

    def _admit(self) -> None:
        """Gives slots to joining rows, as long as there is memory for all."""
        while (row := self._next_to_join()) is not None and self._fits(len(self._rows) + 1, self._longest(row)):
            with self._lock:
                self._joining.remove(row)
            parts, row.fed = self._known(row)
            self._rows.append(row)
            slot = self._slots.take(self._longest())
            if row.fed:
                self._slots.load(slot, parts, row.fed)
            if row.reused is None:
                row.reused = row.fed

    def _next_to_join(self) -> Row | None:
        """Returns the first joining row that need not wait for another row whose keys it could reuse once they are
        read.
        """
        with self._lock:
            joining = list(self._joining)
        return next((row for row in joining if not any(self._reads_for(one, row) for one in self._rows)), None)

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
        for slot, one in enumerate(self._rows):
            if one.owner.is_same(row.owner) and (shared := common(one.ids[: one.fed], wanted)) >= max(
                WORTH, length + 1
            ):
                kept, length = self._slots.save(slot, shared), shared
        return kept, length

    def _read_prompts(self, most: int) -> int:
        """Reads equally many tokens of some prompts, at most `most` in all; returns how many."""
        reading = self._rows[self._running :]
        longest, shortest = max(row.unread for row in reading), min(row.unread for row in reading)
        width = min(-(-shortest // _GRAIN) * _GRAIN, longest, most)
        # The oldest takes part in every pass, so that no number of shorter prompts delays it.
        oldest = min(reading, key=lambda row: row.number)
        others = sorted((row for row in reading if row is not oldest), key=lambda row: (row.unread, row.number))
        chosen = [oldest, *others[: max(most // width - 1, 0)]]
        results = self._pass([(row, min(row.unread, width)) for row in chosen], width)
        for row, (best, found) in zip(chosen, results, strict=True):
            row.fed += min(row.unread, width)
            if not row.unread:
                row.best, row.found = best, found
                self._move(row, self._running)
                self._running += 1
        return width * len(chosen)

    def _move(self, row: Row, slot: int) -> None:
        """Swaps a row with that of another slot."""
        own = self._rows.index(row)
        self._slots.swap(own, slot)
        self._rows[own], self._rows[slot] = self._rows[slot], row

    def _make_room(self) -> None:
        """Puts the youngest rows back in the queue, to be read again later, until the others fit into memory."""
        while not self._fits(len(self._rows), self._longest()):
            row = max(self._rows, key=lambda row: row.number)
            self._take_out(row)
            with self._lock:
                self._joining.appendleft(row)

    def _fits(self, rows: int, longest: int) -> bool:
        return self.memory.reserve(self, self._slots.size(rows, longest), must=rows == 1)

    def _longest(self, *joining: Row) -> int:
        return max(len(row.ids) for row in (*self._rows, *joining)) + _GRAIN

    def _advance(self) -> None:
        # A row whose reader is slow is computed again with the others, at the same position.
        rows = self._rows[: self._running]
        results = self._pass([(row, 1) for row in rows], 1)
        for row, (best, found) in zip(rows, results, strict=True):
            if row.best is None:
                row.fed, row.best, row.found = len(row.ids), best, found

    def _pass(self, rows: list[tuple[Row, int]], width: int) -> list[tuple[int, torch.Tensor | None]]:
        """Returns for each row the likeliest token after that many more tokens, and the logits unless the row is
        greedy.
        """
        placed = [_tokens(row, tokens, width) for row, tokens in rows]
        slots = [self._rows.index(row) for row, _ in rows]
        self._slots.fit(self._longest())
        positions = self._slots.place(slots, [places for _, places in placed])
        with self._laying([row.adapter for row, _ in rows]):
            out = self._model(
                input_ids=torch.tensor([ids for ids, _ in placed], device=self._model.device),
                position_ids=positions,
                attention_mask=self._masks(),
                past_key_values=self._slots,
                use_cache=True,
                logits_to_keep=1,
            )
        return _results(out.logits[:, -1], [row.is_greedy for row, _ in rows])

    def _masks(self) -> Mapping[str, torch.Tensor] | torch.Tensor:
        config = self._model.config
        window = getattr(config, "sliding_window", None)
        if config.model_type in _BY_LAYER:
            kinds = {"full_attention": None, "sliding_attention": window}
            return {kind: self._mask(width) for kind, width in kinds.items()}
        return self._mask(window)

    def _mask(self, window: int | None) -> torch.Tensor:
        visible = self._slots.visible(window)
        if self._model.config._attn_implementation == "sdpa":
            return visible
        added = torch.zeros(visible.shape, dtype=self._model.dtype, device=visible.device)
        return added.masked_fill(~visible, torch.finfo(added.dtype).min)

    def _laying(self, adapters: list[Any]) -> AbstractContextManager[None]:
        return nullcontext() if self._adapters is None else self._adapters.on(adapters)


def _results(logits: torch.Tensor, is_greedy: list[bool]) -> list[tuple[int, torch.Tensor | None]]:
    """Returns what rows need of logits on the device, moved to the CPU; waits for the device once or twice in all."""
    best = logits.argmax(dim=-1)
    others = [i for i, one in enumerate(is_greedy) if not one]
    found = dict(zip(others, logits[others].float().cpu(), strict=True)) if others else {}
    return [(token, found.get(i)) for i, token in enumerate(best.tolist())]


def _tokens(row: Row, tokens: int, width: int) -> tuple[list[int], list[int]]:
    """Returns the next tokens of a row and their positions, padded on the left.

    On the left, so that the last token is last in every row. Padding gets positions after all tokens, where no token
    attends to it and the next token overwrites it.
    """
    start = min(row.fed, len(row.ids) - 1)
    ids, end = row.ids[start : start + tokens], row.fed + tokens
    more = width - tokens
    return ids[:1] * more + ids, [*range(end, end + more), *range(row.fed, end)]
