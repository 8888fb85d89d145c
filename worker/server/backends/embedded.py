"""Holds models in memory and computes their answers together.

Each base is held once, with its adapters on it. Its answers share forward passes (`Batch`); those that a batch cannot
hold run in passes of their own, on the same weights. A full fine-tune is a base of its own. A LoRA that was trained and
scored on a base in 4 bits (QLoRA) answers on the base in the same 4 bits, unless the operator chooses the unquantised
base.
"""

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from tunery.errors import Unsupported
from tunery.planning.precision import Precision, decide, dense_dtype
from tunery.rows.calls import CallSpelling
from tunery.serving import Chosen, Files
from tunery.spec import Qlora
from tunery.storage import Storage
from worker.server import folders, grammar, memory, prompting
from worker.server.answer import Answer
from worker.server.batch import Row
from worker.server.cache_memory import CacheMemory
from worker.server.folders import WEIGHTS
from worker.server.generation import Generation
from worker.server.grammar import Grammar
from worker.server.models import Base, BrokenAdapter, Source
from worker.server.rendering import Rendering, Renderings
from worker.server.residents import Residents
from worker.server.schemas import ChatRequest
from worker.server.streams import Alone, Stream

log = logging.getLogger(__name__)

QloraBase = Literal["as_scored", "unquantised"]


@dataclass(frozen=True)
class Ready:
    """A model that can answer, held in memory until `release`."""

    base: Base
    rendering: Rendering
    adapter: Any
    release: Callable[[], None]

    @property
    def model(self) -> Any:
        return self.base.model if self.adapter is None else self.adapter.model

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and answer together, or None if unknown."""
        length: int | None = getattr(self.base.model.config.get_text_config(), "max_position_embeddings", None)
        batch = self.base.batch
        if batch is None:
            return length
        return batch.longest if length is None else min(length, batch.longest)

    def stream(self, prompt_ids: list[int], project_id: str | None = None, *, is_greedy: bool = False) -> Stream:
        """Returns the stream of logits after a prompt."""
        model = self.base if self.adapter is None else self.adapter
        found: Stream = model.stream(prompt_ids, project_id, is_greedy=is_greedy)
        return found


class Engine:
    """The embedded back end. `answer` may be called by several threads at once, `advance` by one."""

    def __init__(
        self,
        models_dir: Path,
        storage: Storage,
        device: str = "cpu",
        *,
        qlora_base: QloraBase = "as_scored",
        streams: int = 16,
        memory_bytes: int | None = None,
        cache_bytes: int | None = None,
        pinned: frozenset[str] = frozenset(),
        graphs: bool = False,
        prompts_first: bool = False,
        now: datetime | None = None,
    ) -> None:
        """`memory_bytes`: for bases and adapters together; by default half of the device's. `graphs`: passes are
        recorded as CUDA graphs. `prompts_first`: no answer begins before the prompts of all are read. `now`: the time
        that chat templates see; by default that of each request.
        """
        self._models_dir = models_dir
        self._storage = storage
        self._device = device
        self._dtype: torch.dtype = getattr(torch, dense_dtype(torch.device(device).type))  # the same as in training
        self._qlora_base = qlora_base
        self._streams = streams
        self._graphs = graphs
        self._prompts_first = prompts_first
        self._residents = Residents(memory_bytes or memory.of(device) // 2, pinned)
        self._cache = CacheMemory(cache_bytes or memory.of(device) // 8)
        self._renderings = Renderings(now)
        self._ready: Ready | None = None
        self._asked: str | None = None

    @property
    def streams(self) -> int:
        return self._streams

    @property
    def loaded(self) -> str | None:
        """Id of the model that was used last."""
        return self._asked

    @property
    def device(self) -> str:
        return self._device

    def answer(self, request: ChatRequest) -> Generation:
        """Returns the answer to a request, not started yet; the model is loaded when this returns.

        Raises CannotRender and PromptTooLong (the request's fault), StorageFailed, ObjectMissing, ChecksumMismatch.
        """
        ready = self._ready = self.hold(request.chosen)
        self._asked = request.chosen.template.id
        try:
            return _begin(request, ready)
        except BaseException:
            ready.release()
            raise

    def advance(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Computes what the next pieces of these answers need; returns those of which a piece can be read now."""
        streams = [answer.stream for answer in answers if isinstance(answer, Generation)]
        for batch in {id(row.batch): row.batch for row in streams if isinstance(row, Row)}.values():
            try:
                batch.step()
            except Exception as error:
                log.exception("a forward pass of a batch failed")
                batch.fail(error)
        ready = ready_of(streams)
        return [answer for answer, stream in zip(answers, streams, strict=True) if stream in ready]

    def hold(self, chosen: Chosen) -> Ready:
        """Returns the model, which is loaded unless it is in memory. Raises as `answer` does."""
        weights = self._folder(chosen.weights)
        is_new = chosen.adapter is not None and not folders.is_here(self._models_dir, chosen.adapter)
        adapter = None if chosen.adapter is None else self._folder(chosen.adapter)
        four_bits = self._four_bits(chosen, adapter)
        source = Source(weights, four_bits, self._device, self._dtype, self._graphs, self._prompts_first)
        key = f"{chosen.weights.manifest_sha256} {source.four_bits}"
        base = self._hold_base(key, chosen.weights, source)
        try:
            rendering = self._renderings.of(adapter or weights)
            if chosen.adapter is None or adapter is None:
                return Ready(base, rendering, None, _once(lambda: self._residents.release(key)))
            laid_key = f"{key} {chosen.adapter.manifest_sha256}"
            laid = self._hold_adapter(laid_key, chosen.adapter, base, adapter, key, is_new)
        except BaseException:
            self._residents.release(key)
            raise

        def release() -> None:
            self._residents.release(laid_key)
            self._residents.release(key)

        return Ready(base, rendering, laid, _once(release))

    def _hold_base(self, key: str, files: Files, source: Source) -> Base:
        def load() -> Base:
            log.info("loading %s", files.id)
            return Base(source, self._cache)

        return self._residents.hold(key, files.id, source.nbytes, load, waits=True)

    def _hold_adapter(self, key: str, files: Files, base: Base, folder: Path, base_key: str, is_new: bool) -> Any:
        def load() -> Any:
            made = base.lay_on(folder) if is_new else self._lay_on_checked(base, files, folder)
            # An adapter keeps its base in memory, used or not.
            self._hold_base(base_key, files, base.source)
            made.on_leave = lambda: self._residents.release(base_key)
            return made

        size = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).exists() else 0
        return self._residents.hold(key, files.id, size, load)

    def _lay_on_checked(self, base: Base, files: Files, folder: Path) -> Any:
        """Loads an adapter onto its base while its weights are checked; if they have changed, fetches them first."""
        with ThreadPoolExecutor(1, "checker") as checker:
            checking = checker.submit(folders.is_intact, folder)
            try:
                made = base.lay_on(folder)
            except BrokenAdapter:
                if checking.result():
                    raise
            else:
                if checking.result():
                    return made
                made.leave()
        return base.lay_on(folders.fetch_again(self._models_dir, self._storage, files))

    def _folder(self, files: Files) -> Path:
        return folders.fetch(self._models_dir, self._storage, files)

    def _four_bits(self, chosen: Chosen, adapter: Path | None) -> Precision | None:
        """Returns the 4-bit precision in which the adapter's base was scored; None for a base in its own type."""
        if adapter is None or chosen.tuned is None or chosen.tuned.technique != "qlora":
            return None
        is_quantised = self._qlora_base == "as_scored"
        return read_four_bits(adapter, torch.device(self._device).type) if is_quantised else None


def ready_of(streams: Sequence[Stream]) -> list[Stream]:
    """Returns the streams that can be read: rows with results, and others as far as there is memory for their keys."""
    rows = [stream for stream in streams if isinstance(stream, Row) and stream.is_ready]
    alone = [stream for stream in streams if isinstance(stream, Alone)]
    return [*rows, *(stream for place, stream in enumerate(alone) if not place or stream.fits())]


def _begin(request: ChatRequest, ready: Ready) -> Generation:
    prepared = prompting.prepare(request, ready.rendering, ready.context_length)
    kept_to = _grammar(request, ready, prepared.spelling)
    is_greedy = prepared.sampling.is_greedy and kept_to is None and prepared.top_logprobs is None
    return Generation(
        is_greedy=is_greedy,
        on_close=ready.release,
        tokenizer=ready.rendering.template.tokenizer,
        prompt_ids=prepared.ids,
        context=prepared.context,
        max_tokens=prepared.max_tokens,
        eos_ids=ready.rendering.eos_ids,
        stops=prepared.stops,
        grammar=kept_to,
        spelling=prepared.spelling,
        top_logprobs=prepared.top_logprobs,
        sampling=prepared.sampling,
        # Last: a row that has joined the batch stays in it if something after it raises.
        stream=ready.stream(prepared.ids, request.chosen.project_id, is_greedy=is_greedy),
    )


def _once(work: Callable[[], None]) -> Callable[[], None]:
    """Wraps `work` so that only the first call does it."""
    left = [work]

    def call() -> None:
        if left:
            left.pop()()

    return call


def read_four_bits(adapter: Path, device: str) -> Precision | None:
    """Returns the precision of a QLoRA adapter's run, on this kind of device; None if its record is missing."""
    record = adapter / "training_config.json"
    if not record.exists():
        return None
    technique = json.loads(record.read_text())["plan"]["technique"]
    known = {name: value for name, value in technique.items() if name in Qlora.model_fields}
    return decide(Qlora.model_validate(known), device)


def _grammar(request: ChatRequest, ready: Ready, spelling: CallSpelling | None) -> Grammar | None:
    """Returns the grammar of the answer, if it has one. Raises InvalidValue if it cannot be compiled, Unsupported if
    the model's calls have an unknown format.
    """
    size = ready.base.model.get_input_embeddings().weight.shape[0]
    if request.must_call:
        if spelling is None:
            raise Unsupported(
                param="tool_choice",
                what="A tool call in this model's format, which is not JSON,",
                instead="Use 'auto'.",
            )
        source = grammar.of_call(request.callable_tools, spelling, ready.rendering.template.tokenizer)
        return Grammar(ready.rendering.vocabulary(size), source, "tools")
    wanted = grammar.of_format(request.response_format)
    return None if wanted is None else Grammar(ready.rendering.vocabulary(size), wanted, "response_format")
