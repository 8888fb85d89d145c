"""Decides whether a model is sharded over its ranks, and computes each rank's memory in a full fine-tune, with weights
on no device.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from tunery.planning import expected
from tunery.planning.precision import BYTES, Precision
from tunery.rows.template import ChatTemplate
from tunery.spec import Plan
from worker.trainer import coverage, inspection, pieces, sharding
from worker.trainer.adamw import SMALL
from worker.trainer.parallel import Ranks
from worker.trainer.precision import dtype


def is_cut(plan: Plan, base: Path, template: ChatTemplate, ranks: Ranks) -> bool:
    """Whether a run's model is sharded over its ranks: as its plan says, or, if that is left open, by its memory."""
    asked = plan.resources.sharding
    if ranks.count == 1 or asked != "auto":
        return ranks.count > 1 and asked == "full_shard"
    if ranks.device.type != "cuda":
        return False
    model = inspection.skeleton(str(base), base)
    known = inspection.model_info(str(base), model, template) | coverage.model_info(model.config)
    chosen = expected.choose_sharding(
        known,
        plan.technique,
        gpus=ranks.count,
        asked=asked,
        capacity=torch.cuda.get_device_properties(ranks.device).total_memory,
        max_seq_length=plan.max_seq_length,
        rows=plan.method.rows_an_example,
        optimizer=plan.optimizer,
    )
    return ranks.any(chosen == "full_shard")


@dataclass(frozen=True)
class Layout:
    """One rank's memory in bytes. `gathered`: the most for whole weights and gradients while a layer computes."""

    parameters: int
    weights: int
    gradients: int
    moments: int
    gathered: int

    @property
    def kept(self) -> int:
        """Bytes kept from step to step."""
        return self.weights + self.moments


def compute(config: PretrainedConfig, precision: Precision, ranks: int, rank: int = 0) -> Layout:
    """Returns the layout of a full fine-tune of this architecture, sharded as by `fully_shard`; rank 0 has the most.

    `precision`: that of AdamW without 8-bit moments for fp32 weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype(precision.trained))
    weights = gradients = moments = parameters = 0
    for parameter in model.parameters():
        piece = pieces.cut(parameter.shape, rank, ranks)
        count = (piece.end - piece.start) * piece.row
        parameters += piece.whole
        weights += count * parameter.element_size()
        gradients += count * precision.trained_bytes
        moments += _moments(count, piece.whole, precision)
    return Layout(parameters, weights, gradients, moments, sharding.gathered_bytes(model) if ranks > 1 else 0)


def _moments(count: int, whole: int, precision: Precision) -> int:
    """Returns the bytes of both moments, their scales, and a small weight's fp32 copy."""
    wide = BYTES["float32"]
    if precision.moments == "float32":
        return 2 * wide * count
    return 3 * wide * count if whole < SMALL else 2 * (count + wide * math.ceil(count / pieces.BLOCK))
