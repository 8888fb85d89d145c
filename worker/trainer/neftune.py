"""NEFTune: adds noise to embeddings in training, not in evaluation (Jain et al. 2023, arXiv:2310.05914)."""

from typing import Any

import torch
from torch import Tensor

from worker.trainer.data import Batch


class Noise:
    """Adds uniform noise of up to alpha / sqrt(length * width) to a token's embedding, `length` being its row's.

    Why not transformers' hook: it uses the width of the padded batch as the length, or that of all rows if they are
    concatenated, so a row's noise would depend on the other rows of its batch.
    """

    def __init__(self, causal: Any, alpha: float) -> None:
        self._alpha = alpha
        self._bounds = torch.zeros(1)
        causal.get_input_embeddings().register_forward_hook(self._add)

    def expect(self, batch: Batch) -> None:
        """Records where the rows of the next pass begin and end."""
        bounds = torch.zeros(batch.input_ids.shape)
        for sequence, lengths in zip(bounds, batch.lengths, strict=True):
            start = 0
            for length in lengths:
                sequence[start : start + length] = length**-0.5
                start += length
        self._bounds = bounds.to(batch.input_ids.device)

    def _add(self, module: torch.nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        most = self._alpha * embedded.shape[-1] ** -0.5 * self._bounds
        noise: Tensor = torch.empty_like(embedded).uniform_(-1, 1) * most.unsqueeze(-1).to(embedded.dtype)
        return embedded + noise
