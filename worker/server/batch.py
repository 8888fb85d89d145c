"""Continuous batching: the answers that one base is writing share its forward passes, and join and leave between two.

Prompts are read by passes of their own, several at once and a bounded number of tokens between two steps, so that a
long one holds up nobody: neither the rows that run nor a short prompt behind it.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from threading import Lock
from typing import Any, Protocol

import torch

from worker.server.cache_memory import WORTH, CacheMemory, Owner, common
from worker.server.slots import Parts, Slots
from worker.trainer import rope

PROMPT_TOKENS = 512
"""Tokens of prompts that are read between two steps of the running rows."""
_GRAIN = 32
"""Prompts whose lengths differ by less are read to their ends by one pass."""

_BY_LAYER = frozenset({"qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "cohere2", "gpt_oss"})
_ONE_MASK = frozenset({"llama", "mistral", "mixtral", "qwen3_moe", "phi", "phi3", "granite"})


def can_batch(model: Any) -> bool:
    """Whether rows of different lengths may share the model's passes: its masks and positions are known to be given."""
    return model.config.model_type in _BY_LAYER | _ONE_MASK and not rope.of(model)


class Adapters(Protocol):
    """What lays adapters on the rows of a pass."""

    def on(self, adapters: list[Any]) -> AbstractContextManager[None]:
        """Row i of each pass in the block has adapters[i]; None: the base alone."""


class Row:
    """One answer's stream in a batch. `ids[:fed]` have been read by the model."""

    def __init__(self, batch: "Batch", prompt_ids: list[int], owner: Owner, number: int, is_greedy: bool) -> None:
        """`number`: the more, the younger. `is_greedy`: only `likeliest` is read."""
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
        """Tokens of the prompt whose keys and values were there."""
        return self.reused or 0

    @property
    def unread(self) -> int:
        """Tokens that the model has not read."""
        return len(self.ids) - self.fed

    @property
    def is_ready(self) -> bool:
        """Whether `logits` and `likeliest` compute nothing."""
        return self.best is not None or self.failure is not None

    def likeliest(self) -> int:
        """Returns the likeliest next token. Raises what broke a pass of the batch."""
        while self.best is None:
            if self.failure is not None:
                raise self.failure
            self.batch.step()
        return self.best

    def logits(self) -> torch.Tensor:
        """Logits of the next token (vocabulary, fp32, on the CPU). Raises what broke a pass of the batch."""
        self.likeliest()
        assert self.found is not None, "the row is greedy"
        return self.found

    def push(self, token: int) -> None:
        self.ids.append(token)
        self.best = self.found = None

    def close(self) -> None:
        self.batch.remove(self)


class Batch:
    """The rows of one base. Only `join` may be called by another thread than the one that steps."""

    def __init__(self, model: Any, adapters: Adapters | None = None, memory: CacheMemory | None = None) -> None:
        """`memory`: for keys and values. One row of each batch goes on even where there is none."""
        self._model = model
        self._adapters = adapters
        self.memory = memory or CacheMemory(4 * 2**30)
        self._slots = Slots(model)
        self._rows: list[Row] = []  # in the order of their slots: those that run, then those whose prompts are read
        self._running = 0
        self._joining: deque[Row] = deque()
        self._numbers = count()
        self._lock = Lock()

    @property
    def longest(self) -> int:
        """The most tokens of a row that the memory has room for."""
        return self._slots.most(self.memory.limit) - _GRAIN

    def join(
        self, prompt_ids: list[int], adapter: Any = None, project_id: str | None = None, *, is_greedy: bool = False
    ) -> Row:
        """A stream that begins at the next step. Rows of one project and adapter share the keys of equal beginnings."""
        with self._lock:
            row = Row(self, prompt_ids, Owner(self, adapter, project_id), next(self._numbers), is_greedy)
            self._joining.append(row)
        return row

    @torch.inference_mode()
    def remove(self, row: Row) -> None:
        """Takes a row out, if it is still there, and frees its keys and values."""
        with self._lock:
            if row in self._joining:
                self._joining.remove(row)
        if row in self._rows:
            self._keep(row)
            self._take_out(row)

    def _keep(self, row: Row) -> None:
        slot, length = self._rows.index(row), row.fed
        nbytes = length * self._slots.bytes_a_position
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
        """Takes all rows out, whose readers get the error."""
        with self._lock:
            rows, self._rows, self._running = [*self._rows, *self._joining], [], 0
            self._joining.clear()
        self._slots.clear()
        self.memory.reserve(self, 0, must=True)
        for row in rows:
            row.failure, row.best, row.found = error, None, None

    @torch.inference_mode()
    def step(self) -> None:
        """Reads prompts of rows that join, and gives every running row the logits after its last token."""
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
        """Gives slots to the rows that join, as long as there is memory for all."""
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
        """Returns the first that has not to wait for another row, which is reading what it could take over."""
        with self._lock:
            joining = list(self._joining)
        return next((row for row in joining if not any(self._reads_for(one, row) for one in self._rows)), None)

    def _reads_for(self, one: Row, other: Row) -> bool:
        if one.unread <= 1 or not one.owner.is_same(other.owner):
            return False
        return common(one.ids, other.ids[:-1]) >= one.fed + WORTH

    def _known(self, row: Row) -> tuple[Parts, int]:
        """Keys and values of the row's first tokens, of a row that runs or has ended, and how many these are."""
        wanted = row.ids[:-1]  # the last is read in any case, for its logits
        kept, length = self.memory.find(row.owner, wanted)
        for slot, one in enumerate(self._rows):
            if one.owner.is_same(row.owner) and (shared := common(one.ids[: one.fed], wanted)) >= max(
                WORTH, length + 1
            ):
                kept, length = self._slots.save(slot, shared), shared
        return kept, length

    def _read_prompts(self, most: int) -> int:
        """Reads as many tokens of some prompts, at most `most` in all; returns how many."""
        reading = self._rows[self._running :]
        longest, shortest = max(row.unread for row in reading), min(row.unread for row in reading)
        width = min(-(-shortest // _GRAIN) * _GRAIN, longest, most)
        # The oldest goes on in every pass, so that no number of shorter ones holds it up.
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
        """Lets a row change places with that of another slot."""
        own = self._rows.index(row)
        self._slots.swap(own, slot)
        self._rows[own], self._rows[slot] = self._rows[slot], row

    def _make_room(self) -> None:
        """Sends the youngest rows back to be read again later, while all need more than there may be."""
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
        # A row whose reader is slow is computed with the others and written again at the same place.
        rows = self._rows[: self._running]
        results = self._pass([(row, 1) for row in rows], 1)
        for row, (best, found) in zip(rows, results, strict=True):
            if row.best is None:
                row.fed, row.best, row.found = len(row.ids), best, found

    def _pass(self, rows: list[tuple[Row, int]], width: int) -> list[tuple[int, torch.Tensor | None]]:
        """Returns the likeliest token after so many more of each row, and the logits, unless the row is greedy."""
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
    """Of logits on the device, what rows need on the CPU; the device is waited for once or twice in all."""
    best = logits.argmax(dim=-1)
    others = [i for i, one in enumerate(is_greedy) if not one]
    found = dict(zip(others, logits[others].float().cpu(), strict=True)) if others else {}
    return [(token, found.get(i)) for i, token in enumerate(best.tolist())]


def _tokens(row: Row, tokens: int, width: int) -> tuple[list[int], list[int]]:
    """Returns the next tokens of a row and their positions, filled up on the left.

    On the left, so that the last token stands last in every row. What fills up gets positions behind all tokens, where
    nothing sees it and the next token is written over it.
    """
    start = min(row.fed, len(row.ids) - 1)
    ids, end = row.ids[start : start + tokens], row.fed + tokens
    more = width - tokens
    return ids[:1] * more + ids, [*range(end, end + more), *range(row.fed, end)]
