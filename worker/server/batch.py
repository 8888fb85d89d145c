"""Continuous batching: the answers that one base is writing share its forward passes, and join and leave between two.

A prompt is read by passes of its own, a bounded number of tokens between two steps, so that a long one holds up nobody.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, Protocol

import torch

from worker.server.slots import Slots
from worker.trainer import rope

PROMPT_TOKENS = 512
"""Tokens of prompts that are read between two steps of the running rows."""

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

    def __init__(self, batch: "Batch", prompt_ids: list[int], adapter: Any = None) -> None:
        self.batch = batch
        self.adapter = adapter
        self.ids = list(prompt_ids)
        self.fed = 0
        self.cache: Any = None
        self.found: torch.Tensor | None = None
        self.failure: Exception | None = None

    @property
    def is_ready(self) -> bool:
        """Whether `logits` computes nothing."""
        return self.found is not None or self.failure is not None

    def logits(self) -> torch.Tensor:
        """Logits of the next token (vocabulary, fp32, on the CPU). Raises what broke a pass of the batch."""
        while self.found is None:
            if self.failure is not None:
                raise self.failure
            self.batch.step()
        return self.found

    def push(self, token: int) -> None:
        self.ids.append(token)
        self.found = None

    def close(self) -> None:
        self.batch.remove(self)


class Batch:
    """The rows of one base. Only `join` may be called by another thread than the one that steps."""

    def __init__(self, model: Any, adapters: Adapters | None = None, cache_bytes: int = 4 * 2**30) -> None:
        """`cache_bytes`: what the keys and values of all rows may take, if they are more than one."""
        self._model = model
        self._adapters = adapters
        self._cache_bytes = cache_bytes
        self._slots = Slots()
        self._rows: list[Row] = []  # in the order of their slots
        self._joining: deque[Row] = deque()
        self._lock = Lock()

    def join(self, prompt_ids: list[int], adapter: Any = None) -> Row:
        """A stream that begins at the next step."""
        row = Row(self, prompt_ids, adapter)
        with self._lock:
            self._joining.append(row)
        return row

    @torch.inference_mode()
    def remove(self, row: Row) -> None:
        """Takes a row out, if it is still there, and frees its keys and values."""
        with self._lock:
            if row in self._joining:
                self._joining.remove(row)
        if row in self._rows:
            slot = self._rows.index(row)
            self._slots.drop(slot)
            self._rows[slot] = self._rows[-1]
            self._rows.pop()
        row.cache = None

    def fail(self, error: Exception) -> None:
        """Takes all rows out, whose readers get the error."""
        with self._lock:
            rows, self._rows = [*self._rows, *self._joining], []
            self._joining.clear()
        self._slots = Slots()
        for row in rows:
            row.failure, row.found, row.cache = error, None, None

    @torch.inference_mode()
    def step(self) -> None:
        """Reads prompts of rows that join, and gives every running row the logits after its last token."""
        self._read_prompts()
        if any(row.found is None for row in self._rows):
            self._make_room()
            self._advance()

    def _read_prompts(self) -> None:
        room = PROMPT_TOKENS
        while room > 0 and (row := self._next_to_join()) is not None:
            ids = row.ids[row.fed : row.fed + room]
            room -= len(ids)
            with self._laying([row.adapter]):
                out = self._model(
                    input_ids=torch.tensor([ids], device=self._model.device),
                    past_key_values=row.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            row.fed, row.cache = row.fed + len(ids), out.past_key_values
            if row.fed == len(row.ids):
                self._run(row, out.logits[0, -1])

    def _next_to_join(self) -> Row | None:
        with self._lock:
            row = self._joining[0] if self._joining else None
        if row is None or not self._rows or row.fed:
            return row
        return row if self._bytes(len(self._rows) + 1, self._longest(row)) <= self._cache_bytes else None

    def _run(self, row: Row, logits: torch.Tensor) -> None:
        self._slots.adopt(row.cache)
        row.cache, row.found = None, logits.float().cpu()
        self._rows.append(row)
        with self._lock:
            self._joining.remove(row)

    def _make_room(self) -> None:
        """Sends the youngest rows back to be read anew later, while all need more than there may be."""
        while len(self._rows) > 1 and self._bytes(len(self._rows), self._longest()) > self._cache_bytes:
            row = self._rows[-1]
            self.remove(row)
            row.fed = 0
            with self._lock:
                self._joining.appendleft(row)

    def _bytes(self, rows: int, length: int) -> int:
        return rows * length * self._slots.bytes_a_position

    def _longest(self, *joining: Row) -> int:
        return max(len(row.ids) for row in (*self._rows, *joining)) + 1

    def _advance(self) -> None:
        # A row whose reader is slow is computed with the others and written again at the same place.
        positions = self._slots.place([row.fed for row in self._rows])
        device = self._model.device
        with self._laying([row.adapter for row in self._rows]):
            out = self._model(
                input_ids=torch.tensor([[row.ids[-1]] for row in self._rows], device=device),
                position_ids=positions[:, None],
                attention_mask=self._masks(),
                past_key_values=self._slots,
                use_cache=True,
            )
        every = out.logits[:, -1].float().cpu()
        for row, logits in zip(self._rows, every, strict=True):
            if row.found is None:
                row.fed, row.found = len(row.ids), logits

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
