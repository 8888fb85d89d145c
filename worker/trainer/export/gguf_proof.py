"""Measures the loss from a GGUF file's rounding, by reading the file back into the model it was made from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from worker.trainer.data import Row
from worker.trainer.export import gguf_models, gguf_writer, proof
from worker.trainer.export.proof import Answered, Divergence


class Meter:
    """Compares GGUF files with the whole model in a folder, which is kept in memory in fp32, on the CPU."""

    def __init__(self, folder: Path, rows: Iterable[Row]) -> None:
        self._config: Any = AutoConfig.from_pretrained(folder)
        self._family = gguf_models.find(self._config)
        self._names = gguf_writer.names(folder, self._family, self._config)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._rows = proof.choose(rows, self._config.vocab_size)
        self._reference = proof.log_probs(self._model, self._rows)

    def measure(self, path: Path) -> tuple[Divergence, Answered]:
        """Measures how far the model with the file's weights differs from the original, and how both would answer."""
        state = self._model.state_dict()
        for tensor in GGUFReader(path).tensors:
            if tensor.name in self._names:
                numbers = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape.tolist()[::-1])
                changed = gguf_writer.restore(numbers, tensor.name, self._family, self._config)
                state[self._names[tensor.name]].copy_(torch.from_numpy(changed.copy()))
        found = proof.log_probs(self._model, self._rows)
        return proof.compare(self._reference, found), proof.compare_answers(self._reference, found, self._rows)
