"""The model in memory: which weights and adapter it is, and how it becomes another.

One base at a time, kept while its tunes come and go: a LoRA is laid on it in about a second, a base takes as long as
its weights take to read. A full fine-tune is a base of its own. A LoRA that was trained and scored on a base in 4 bits
(QLoRA) is laid on the base in the same 4 bits, unless the operator wants the unquantised one.
"""

import gc
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from llguidance import LLTokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tunery.errors import Unsupported
from tunery.failures import CannotQuantise
from tunery.planning.precision import Precision, decide, dense_dtype
from tunery.rows.calls import CallSpelling
from tunery.rows.errors import PromptTooLong
from tunery.rows.template import ChatTemplate
from tunery.serving import Chosen, Files
from tunery.spec import Qlora
from tunery.storage import Storage
from worker.server import grammar
from worker.server.generation import Generation, Sampling
from worker.server.grammar import Grammar
from worker.server.schemas import ChatRequest
from worker.supervisor.staging import base_folder
from worker.trainer import rope
from worker.trainer.recipes.qlora import load_quantised

log = logging.getLogger(__name__)

UNKNOWN_CONTEXT = 4096
"""The most tokens of an answer, unless the request says, where the model's config names no context length."""

QloraBase = Literal["as_scored", "unquantised"]

_LONG = 16
"""Characters a token of the context, of which a prompt has far fewer unless most of it is blank."""


@dataclass(frozen=True)
class Ready:
    """A model that can answer. `context_length` is the most tokens of prompt and answer together; None: unknown."""

    model: Any
    template: ChatTemplate
    eos_ids: frozenset[int]
    context_length: int | None

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        """What grammars are compiled for: made by the first answer that has one."""
        size = self.model.get_input_embeddings().weight.shape[0]
        return grammar.read_vocabulary(self.template.tokenizer, size, self.eos_ids)

    @cached_property
    def spelling(self) -> CallSpelling | None:
        """How the template writes tool calls; None where it writes none that can be read."""
        return CallSpelling.find(self.template)


class Engine:
    """Not safe to share between threads: `Desk` calls it from one."""

    def __init__(
        self, models_dir: Path, storage: Storage, device: str = "cpu", *, qlora_base: QloraBase = "as_scored"
    ) -> None:
        self._models_dir = models_dir
        self._storage = storage
        self._device = device
        self._dtype: torch.dtype = getattr(torch, dense_dtype(torch.device(device).type))  # that of the training
        self._base: Any = None
        self._qlora_base = qlora_base
        self._base_of: tuple[str, Precision | None] | None = None  # sha256 of its manifest, and its four bits
        self._adapted: Any = None  # the same base with an adapter laid on it
        self._ready: Ready | None = None
        self._chosen: Chosen | None = None

    @property
    def loaded(self) -> str | None:
        """Id of the model in memory."""
        chosen = self._chosen
        return None if chosen is None else chosen.template.id

    @property
    def device(self) -> str:
        return self._device

    def answer(self, request: ChatRequest) -> Generation:
        """The answer to a request, not begun yet; the model is loaded when this returns.

        Raises CannotRender and PromptTooLong (the request's fault), StorageFailed, ObjectMissing, ChecksumMismatch.
        """
        ready = self._load(request.chosen)
        _refuse_much_too_long(request, ready)
        prompt = ready.template.encode_prompt(request.messages, request.offered_tools)
        spelling = ready.spelling if request.offered_tools else None
        return Generation(
            model=ready.model,
            tokenizer=ready.template.tokenizer,
            prompt_ids=prompt,
            context=ready.template.answer_context(prompt),
            max_tokens=_room(request, len(prompt), ready.context_length),
            eos_ids=ready.eos_ids,
            stops=request.stops,
            rope=rope.of(ready.model),
            grammar=_grammar(request, ready, spelling),
            spelling=spelling,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            sampling=Sampling(
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=request.seed,
            ),
        )

    def _load(self, chosen: Chosen) -> Ready:
        if self._ready is None or chosen != self._chosen:
            self._ready = self._chosen = None  # a load that fails half-way must not leave the last model's name
            self._ready = self._assemble(chosen)
            self._chosen = chosen
        return self._ready

    def _assemble(self, chosen: Chosen) -> Ready:
        weights = self._folder(chosen.weights)
        adapter = None if chosen.adapter is None else self._folder(chosen.adapter)
        self._settle_base(chosen.weights, weights, self._four_bits(chosen, adapter))
        if adapter is not None:
            self._lay_on(adapter)
        template = ChatTemplate.load(adapter or weights)
        return Ready(
            model=self._base if adapter is None else self._adapted,
            template=template,
            eos_ids=frozenset(template.eos_ids),
            context_length=getattr(self._base.config.get_text_config(), "max_position_embeddings", None),
        )

    def _folder(self, files: Files) -> Path:
        return base_folder(self._models_dir, self._storage, files.prefix, files.manifest_sha256)

    def _four_bits(self, chosen: Chosen, adapter: Path | None) -> Precision | None:
        """The four bits that the adapter's base was in when it was scored; None for a base in its own type."""
        if adapter is None or chosen.tuned is None or chosen.tuned.technique != "qlora":
            return None
        is_quantised = self._qlora_base == "as_scored"
        return read_four_bits(adapter, torch.device(self._device).type) if is_quantised else None

    def _settle_base(self, files: Files, folder: Path, four_bits: Precision | None) -> None:
        """The wanted weights in memory, without an adapter."""
        if self._adapted is not None:
            self._base, self._adapted = self._adapted.unload(), None
        if self._base_of == (files.manifest_sha256, four_bits):
            return
        self._base, self._base_of = None, None
        gc.collect()  # the memory may not hold two bases at once
        torch.cuda.empty_cache()
        log.info("loading %s", files.id)
        self._base = self._read_base(folder, four_bits).eval()
        self._base_of = files.manifest_sha256, four_bits
        rope.install(self._base)

    def _read_base(self, folder: Path, four_bits: Precision | None) -> Any:
        if four_bits is not None:
            try:
                return load_quantised(folder, four_bits, torch.device(self._device))
            except CannotQuantise as error:  # what an earlier release did not refuse to train
                log.warning("%s is served as it is: %s", folder.name, error)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
        return model.to(self._device)

    def _lay_on(self, adapter: Path) -> None:
        """The adapter on the base, in fp32 on any base, as it was trained."""
        base_of, self._base_of = self._base_of, None  # an adapter that breaks half-way has spoilt the base
        self._adapted = PeftModel.from_pretrained(self._base, adapter, torch_device=self._device).eval()
        self._base_of = base_of


def read_four_bits(adapter: Path, device: str) -> Precision | None:
    """The precision of a QLoRA adapter's run, on this kind of device; None where its record is missing."""
    record = adapter / "training_config.json"
    if not record.exists():
        return None
    technique = json.loads(record.read_text())["plan"]["technique"]
    known = {name: value for name, value in technique.items() if name in Qlora.model_fields}
    return decide(Qlora.model_validate(known), device)


def _refuse_much_too_long(request: ChatRequest, ready: Ready) -> None:
    """Raises PromptTooLong for a prompt that is known to be by its beginning: millions of words take as many seconds to
    tokenise, for which nobody else is answered."""
    limit = ready.context_length
    if limit is None or sum(len(message.content or "") for message in request.messages) <= _LONG * limit:
        return
    text = ready.template.render(request.messages, request.offered_tools, add_generation_prompt=True)
    tokens = len(ready.template.tokenizer.encode(text[: _LONG * limit], add_special_tokens=False).ids)
    if tokens - _LONG > limit:  # the cut may have made a few more of the last word
        raise PromptTooLong(param="messages", limit=limit, tokens=f"more than {tokens - _LONG}")


def _grammar(request: ChatRequest, ready: Ready, spelling: CallSpelling | None) -> Grammar | None:
    """What the answer has to keep to. Raises InvalidValue where it cannot be compiled, Unsupported of unknown calls."""
    if request.must_call:
        if spelling is None:
            raise Unsupported(
                param="tool_choice", what="A call in this model's spelling, which is not JSON,", instead="Use 'auto'."
            )
        source = grammar.of_call(request.callable_tools, spelling, ready.template.tokenizer)
        return Grammar(ready.vocabulary, source, "tools")
    wanted = grammar.of_format(request.response_format)
    return None if wanted is None else Grammar(ready.vocabulary, wanted, "response_format")


def _room(request: ChatRequest, prompt_tokens: int, context_length: int | None) -> int:
    """The most tokens that the answer may have. Raises PromptTooLong when that would be none."""
    wanted = request.max_completion_tokens or request.max_tokens
    if context_length is None:
        return wanted or UNKNOWN_CONTEXT
    if prompt_tokens >= context_length:
        raise PromptTooLong(param="messages", limit=context_length, tokens=prompt_tokens)
    return min(wanted or context_length, context_length - prompt_tokens)
