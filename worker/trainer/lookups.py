"""Which rows of the input embedding can have a gradient in a step: those of the tokens that its examples have.

The embedding's gradient is the last that a backward pass computes, so nothing hides its transfer between GPUs, and it
may be half a gigabyte. But a step of 16,000 tokens looks up an eighth of a vocabulary of 128,256 at most. Every rank
knows the examples of all, so the ranks agree on these rows without asking each other.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from worker.trainer.data import PADDING, Rows, move
from worker.trainer.objective import Objective

MOST = 0.5
"""Fraction of the vocabulary above which the gradient is sent whole: the rows are sent from a copy."""


def embedding_of(objective: Objective) -> nn.Parameter | None:
    """Returns the weight of the input embedding if it is trained and only the tokens of a step's rows are looked up.

    None if the head is tied to it, as every row then has a gradient; or if others may be looked up: by the method, or
    in the idle passes of a sharded model.
    """
    if objective.is_sharded or not getattr(objective.method, "looks_up_rows_only", False):  # plug-ins may not say
        return None
    causal: Any = objective.causal
    # PEFT wraps an embedding in modules_to_save, and trains a copy of it.
    embeddings = [each for each in causal.get_input_embeddings().modules() if isinstance(each, nn.Embedding)]
    weight = next((cast(nn.Parameter, each.weight) for each in embeddings if each.weight.requires_grad), None)
    names = [name for name, each in causal.named_parameters(remove_duplicate=False) if each is weight]
    return weight if len(names) == 1 else None


class Lookups:
    """The rows of one embedding that steps of some examples look up."""

    def __init__(self, embedding: nn.Parameter, rows: Rows) -> None:
        self._embedding, self._rows = embedding, rows

    def of_step(self, drawn: Sequence[int]) -> Tensor | None:
        """Returns the sorted ids of all tokens in these examples' batches, with that of padding, on the embedding's
        device; None if they are more than MOST of the vocabulary.
        """
        vocabulary = self._embedding.shape[0]
        is_there = torch.zeros(vocabulary, dtype=torch.bool)
        is_there[PADDING] = True  # hidden states that are not finite would give it a gradient
        for i in drawn:
            for row in self._rows.examples[i].rows:
                is_there[torch.tensor(row.input_ids, dtype=torch.int64)] = True
        ids = is_there.nonzero().flatten()
        return move(ids, self._embedding.device) if len(ids) <= MOST * vocabulary else None
