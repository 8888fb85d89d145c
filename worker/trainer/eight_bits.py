"""Training with the frozen layers' products in eight bits: which layers use them, and how their results are checked.

The base stays in bf16 or in four bits: answers, the scorecard and the check of the exported adapter use it, as any
server of the adapter will. Only the products of training, forward and backward, are narrow (in eight bits).
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from operator import call
from typing import Any

import torch
from torch import nn

from tunery.planning.precision import Precision
from worker.trainer.data import Batch, Example, collate
from worker.trainer.kernels import adapters, fp8
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks

log = logging.getLogger(__name__)

LEAST_COSINE = 0.99
NORM_RATIOS = (0.98, 1.02)
"""Bounds of a narrow product's norm relative to the wide one of the same factors. Rows of e4m3 without outliers are at
0.9993.
"""
EARLY_CHECK, EVERY = 20, 500

Compared = dict[str, tuple[float, float]]
"""The cosine and the norm ratio of a layer's narrow and wide product, by its name."""


class EightBits:
    """A run's narrow products. `names`: the layers that use them; `wide`: those that no longer do, and why."""

    def __init__(self, objective: Objective, batch: Batch) -> None:
        """`batch`: the data on which products are compared."""
        self._objective, self._batch = objective, batch
        self.names = adapters.narrow(objective.model)
        self.wide: dict[str, str] = {}

    def due(self, step: int) -> bool:
        """Whether products are compared after this step."""
        return bool(self.names) and (step == EARLY_CHECK or step % EVERY == 0)

    def check(self, ranks: Ranks, between_steps: Callable[[Callable[[], Compared]], Compared] = call) -> bool:
        """Compares the products; False if some are wide from now on, on every rank.

        `between_steps`: calls what needs memory that recorded steps keep.
        """
        found = between_steps(lambda: compare(self._objective, self._batch, self.names))
        worst = min(found.items(), key=lambda item: item[1][0], default=None)
        log.info("products in eight bits, of %d layers: least cosine %s", len(self.names), worst)
        mine = {name: _reason(*product) for name, product in found.items() if not close(*product)}
        every = {name: why for part in ranks.gather(mine) for name, why in part.items()}
        self.widen(every)
        return not every

    def widen(self, reasons: dict[str, str]) -> None:
        """Makes these layers' products wide from now on."""
        given_up = {name: why for name, why in reasons.items() if name in self.names}
        for name, why in given_up.items():
            log.warning("products of %s in bfloat16 from here on: %s", name, why)
        adapters.widen(self._objective.model, given_up)
        self.wide |= given_up
        self.names = [name for name in self.names if name not in given_up]

    def describe(self) -> dict[str, Any]:
        """Returns the record's entry: the layers that multiply in eight bits, by kind, and those that no longer do."""
        if not self.names and not self.wide:
            return {"path": "bfloat16"}
        kinds = Counter(name.rpartition(".")[2] for name in self.names)
        narrow = {"path": "fp8", "forward and gradient of the input": dict(sorted(kinds.items()))}
        return narrow | ({"given up": dict(sorted(self.wide.items()))} if self.wide else {})


def install(
    objective: Objective, precision: Precision, examples: Sequence[Example], ranks: Ranks, warnings: list[str]
) -> EightBits | None:
    """Switches a run's products to eight bits if its plan says so, and compares them once.

    Returns None if the plan does not say so, or if it is not possible: then a warning says why.
    """
    if not precision.fp8:
        return None
    made, why = _narrow(objective, examples, ranks)
    if made is None:
        warnings.append(f"precision fp8 was not used: {why}.")
        return None
    if not made.check(ranks):
        names = ", ".join(sorted(made.wide))
        warnings.append(
            f"precision fp8 was not used for {names}, whose fp8 products differ too much from those in bf16."
        )
    return made


def _narrow(objective: Objective, examples: Sequence[Example], ranks: Ranks) -> tuple[EightBits | None, str]:
    """Returns the run's narrow products, or the reason against them, the same on every rank."""
    if ranks.any(not fp8.available(ranks.device)):
        one = ranks.count == 1
        return None, f"{'this device has' if one else 'one or more of the devices have'} no fp8 matrix products"
    if objective.method.reads_reference:
        return None, (
            "preferences are learned from small differences from the initial model, which eight bits would round away"
        )
    if objective.is_sharded:
        return None, "the base is sharded over the GPUs, and only a whole base can be packed"
    made = EightBits(objective, _shadow(examples, ranks.device))
    if not made.names:
        return None, f"no adapted layer has both sides of at least {fp8.LEAST_SIDE} and a plain LoRA update"
    return made, ""


def compare(objective: Objective, batch: Batch, names: Collection[str]) -> Compared:
    """Compares each layer's narrow and wide product; returns the cosine and norm ratio of the worse direction.

    Both products have the factors of the narrow pass. Why not compare whole gradients of narrow and wide passes: there
    the small errors of all layers above add up, whatever the layer itself does.
    """
    layers = {objective.model.get_submodule(name).base_layer: name for name in names}
    parameters: list[nn.Parameter] = [p for p in objective.parameters() if p.requires_grad]
    objective.train()
    device = batch.input_ids.device

    def run() -> None:
        with objective.passing():
            sums = objective.sums(batch, 1 / max(1, batch.targets.numel()))
            # Not `backward`: recorded passes may add to `.grad`.
            torch.autograd.grad(sums["loss"], parameters, allow_unused=True)

    with fp8.watched() as watch, torch.random.fork_rng([device] if device.type == "cuda" else []):
        objective.with_least_memory(run)
    found: dict[str, tuple[float, float]] = {}
    for (base, _), product in watch.found.items():
        name = layers[base]
        found[name] = min(found.get(name, product), product, key=lambda each: _closeness(*each))
    return found


def close(cosine: float, ratio: float) -> bool:
    """Whether a narrow product is close enough to replace the wide one."""
    return cosine >= LEAST_COSINE and NORM_RATIOS[0] <= ratio <= NORM_RATIOS[1]


def _closeness(cosine: float, ratio: float) -> float:
    """Returns a larger number for a closer product; NaN counts as the farthest."""
    distance = max((1 - cosine) / (1 - LEAST_COSINE), abs(ratio - 1) / (NORM_RATIOS[1] - 1))
    return -distance if distance == distance else float("-inf")


def _reason(cosine: float, ratio: float) -> str:
    return f"cosine {cosine:.4f} and {ratio:.3f} times the length of the wide product"


def _shadow(examples: Sequence[Example], device: torch.device) -> Batch:
    """Returns the example of median length, the same on every rank."""
    lengths = list(map(len, examples))
    example = examples[sorted(range(len(examples)), key=lengths.__getitem__)[len(examples) // 2]]
    return collate([example], [[0]], device)
