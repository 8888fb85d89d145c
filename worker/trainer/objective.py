"""What is minimised: the sum of the losses of the labelled tokens of a micro-batch."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from worker.trainer.data import Batch
from worker.trainer.kernels import cross_entropy

_HEAD_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")
"""Config entries of models that do more to their logits than one product (Gemma 2, Granite, Cohere, Falcon H1)."""


class Objective(nn.Module):
    """A causal model with its loss: `objective(batch, scale)` -> (`scale` times the sum of losses, right guesses)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.chunked = _is_plain_product(self.causal)

    def forward(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        if not self.chunked:
            return self._by_whole_logits(batch, scale)
        hidden = self.causal.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.where)
        return cross_entropy.scaled(rows, self.causal.get_output_embeddings().weight, batch.targets, scale)

    @torch.no_grad()
    def settle(self, batch: Batch) -> None:
        """Tries the chunked loss beside the model's own logits and leaves it where they differ by more than rounding.

        `_HEAD_CHANGES` names what models are known to do to their logits; the next architecture may do it by another
        name, and a loss that is wrong by a factor still falls.
        """
        if not self.chunked:
            return
        self.eval()
        chunked, whole = (float(loss(batch, 1.0)[0]) for loss in (self.forward, self._by_whole_logits))
        tolerance = 2e-2 if batch.input_ids.is_cuda else 1e-3
        self.chunked = abs(chunked - whole) <= tolerance * abs(whole)

    def _by_whole_logits(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        logits = self.causal(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        rows = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.where)
        return cross_entropy.plain(rows, batch.targets, scale)


def _is_plain_product(causal: Any) -> bool:
    """Whether the logits are the last hidden state times the head's weight and nothing else."""
    head = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    changed = any(getattr(config, name, None) not in (None, 1, 1.0, False) for name in _HEAD_CHANGES)
    backbone = causal.base_model
    return type(head) is nn.Linear and head.bias is None and backbone is not causal and not changed


def all_and_trainable(model: nn.Module) -> tuple[int, int]:
    """Numbers of all weights and of those that learn; a weight in 4 bits counts as the number it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable
