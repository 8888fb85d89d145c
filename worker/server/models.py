"""Bases and adapters in memory."""

import copy
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from tunery.errors import TuneryError
from tunery.failures import CannotQuantise
from tunery.planning.precision import Precision
from worker.server.bank import Bank
from worker.server.batch import Batch
from worker.server.cache_memory import CacheMemory
from worker.server.factors import Factors
from worker.server.streams import Alone, Stream
from worker.trainer import rope
from worker.trainer.decoding import passes
from worker.trainer.decoding.graphs import Recorder, recorder_for
from worker.trainer.recipes.qlora import load_quantised

log = logging.getLogger(__name__)


class BrokenAdapter(TuneryError):
    """The adapter cannot be loaded onto its base ({reason}). Import or train it again."""

    code = "broken_adapter"


@dataclass(frozen=True)
class Source:
    """Where a base is read from and in which precision it is kept. `four_bits`: its quantisation, if it has one.
    `graphs`: its passes are recorded as CUDA graphs where they can be. `prompts_first`: its batch reads all prompts
    before it answers any.
    """

    folder: Path
    four_bits: Precision | None
    device: str
    dtype: torch.dtype
    graphs: bool = False
    prompts_first: bool = False

    @property
    def nbytes(self) -> int:
        """Estimates the base's memory from its files, which are mostly in 16 bits."""
        files = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        return files // 3 if self.four_bits else files * self.dtype.itemsize // 2

    def read(self) -> Any:
        """Returns the model."""
        return self._quantised() or self._plain()

    def _quantised(self) -> Any:
        if self.four_bits is None:
            return None
        try:
            return load_quantised(self.folder, self.four_bits, torch.device(self.device))
        except CannotQuantise as error:  # an earlier release trained on such a base
            log.warning("%s is served as it is: %s", self.folder.name, error)
            return None

    def _plain(self) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
        return model.to(self.device)


class Base:
    """A base in memory."""

    def __init__(self, source: Source, memory: CacheMemory) -> None:
        self.source = source
        self.model: Any = source.read().eval()
        rope.install(self.model)
        self.nbytes = _nbytes(self.model)
        self.unhooked = shared(self.model)
        self.bank = Bank(self.model)
        self.memory = memory
        recorder = recorder_for(self.model) if source.graphs else None
        self.batch = self._new_batch(recorder) if passes.are_known(self.model) else None

    def _new_batch(self, recorder: Callable[[], Recorder] | None) -> Batch:
        first = self.source.prompts_first
        return Batch(self.model, self.bank, self.memory, recorder=recorder, prompts_first=first)

    def stream(self, prompt_ids: list[int], project_id: str | None = None, *, is_greedy: bool = False) -> Stream:
        """Returns the logits after a prompt."""
        if self.batch is not None:
            return self.batch.join(prompt_ids, None, project_id, is_greedy=is_greedy)
        return Alone(self.model, prompt_ids, rope.of(self.model), self.memory)

    def lay_on(self, folder: Path) -> "StackedAdapter | AdapterAlone":
        """Loads a folder's adapter on this base. Raises BrokenAdapter."""
        try:
            factors = None if self.batch is None else Factors.read(folder, self.model)
            return AdapterAlone(self, folder) if factors is None else StackedAdapter(self, factors)
        # PEFT and safetensors raise these for files that are not an adapter of this base.
        except (ValueError, KeyError, RuntimeError, TypeError, OSError, SafetensorError) as error:
            raise BrokenAdapter(reason=str(error).strip().partition("\n")[0]) from error

    def leave(self) -> None:
        if self.batch is not None:
            self.batch.clear()
            self.memory.forget(self.batch)
        self.model = self.unhooked = self.bank = self.batch = None  # type: ignore[assignment]  # unused from now on
        gc.collect()
        torch.cuda.empty_cache()


class StackedAdapter:
    """An adapter whose answers share the passes of its base's batch."""

    def __init__(self, base: Base, factors: Factors) -> None:
        self.model = base.model
        self.nbytes = factors.nbytes
        self.on_leave: Callable[[], None] = lambda: None
        self._base = base
        self._factors = factors
        base.bank.add(factors)

    def stream(self, prompt_ids: list[int], project_id: str | None = None, *, is_greedy: bool = False) -> Stream:
        """Returns the logits after a prompt."""
        assert self._base.batch is not None
        return self._base.batch.join(prompt_ids, self._factors, project_id, is_greedy=is_greedy)

    def leave(self) -> None:
        self._base.bank.remove(self._factors)
        self._base.memory.forget(self._factors)
        self.on_leave()


class AdapterAlone:
    """An adapter applied by PEFT, in fp32 as it was trained. Its answers have passes of their own."""

    def __init__(self, base: Base, folder: Path) -> None:
        laid = PeftModel.from_pretrained(shared(base.unhooked), folder, torch_device=base.source.device)
        self.model: Any = laid.eval()
        self._memory = base.memory
        own = {id(part) for part in _tensors(base.model)}
        self.nbytes = sum(part.nbytes for part in _tensors(self.model) if id(part) not in own)
        self.on_leave: Callable[[], None] = lambda: None

    def stream(self, prompt_ids: list[int], project_id: str | None = None, *, is_greedy: bool = False) -> Stream:  # noqa: ARG002  as the others'
        """Returns the logits after a prompt."""
        return Alone(self.model, prompt_ids, rope.of(self.model), self._memory)

    def leave(self) -> None:
        self.model = None
        self.on_leave()


def shared(model: nn.Module) -> nn.Module:
    """Returns a second model on the same weights in memory, whose layers can be replaced without changing the first."""
    return copy.deepcopy(model, {id(part): part for part in _tensors(model)})


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _nbytes(model: nn.Module) -> int:
    return sum(part.nbytes for part in _tensors(model))
