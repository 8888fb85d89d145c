"""Captures forward and backward passes of few tokens as CUDA graphs, once per shape, and replays them.

A model of 135M parameters runs some 4,000 kernels a step, each of which ends before the host has launched the next: the
GPU waits for Python. A graph is one launch. Batches are padded to a grid of shapes, so that a run needs a few
dozen graphs; padded positions predict nothing (label -100), so sums are unchanged.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunery.planning.expected import OVERLAPPED, most_recorded
from worker.trainer import experts, rope
from worker.trainer.data import Batch
from worker.trainer.decoding.graphs import CudaRecorder, Recorder
from worker.trainer.kernels import accumulation, attention
from worker.trainer.kernels import experts as grouped
from worker.trainer.memory import release, shortage_noticed
from worker.trainer.objective import Objective, all_and_trainable
from worker.trainer.recipes import targets

log = logging.getLogger(__name__)

PAD_TO = (32, 128)
"""What a rectangle's width and its number of labels are padded to. Other rows are padded to what `data` says."""
MOST_GRAPHS = 48
SCALE = 2.0**-11
"""Scale of losses inside a graph, as the sum of a step's weights is not known when the graph is captured. A power of
two, so that undoing it is exact.
"""


@dataclass
class _Recorded:
    batch: Batch
    sums: Tensor
    replay: Callable[[], None]


class CudaGraphs:
    """The captured passes of one objective. Like eager passes, they accumulate into `.grad`."""

    def __init__(self, objective: Objective, recorder: Recorder | None = None) -> None:
        self._objective = objective
        self._recorder = recorder or CudaRecorder()
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._each_warms_up = False
        self._most = most_tokens(objective)
        self.failed = False

    def run(self, batch: Batch) -> Tensor:
        """Returns the method's sums over a batch, "loss" scaled by SCALE, and accumulates the gradient, scaled too.

        The first batch of a shape runs eagerly, which also warms up its kernels; the second is captured. Of
        concatenated rows, whose kernels are the same for any number of tokens, only the first shape is warmed up of
        those with the same kernels. A batch that is too large to gain from it always runs eagerly.
        """
        if batch.input_ids.numel() > self._most:
            return forward_backward(self._objective, batch, SCALE)
        key = _shape(batch)
        if self._is_warm(key):
            self._record(key, batch)
        self._seen.add(key)
        if key not in self._recorded:
            return forward_backward(self._objective, batch, SCALE)
        found = self._recorded[key]
        _copy(batch, found.batch)
        with shortage_noticed():
            found.replay()
        return found.sums.clone()

    def record_ahead(self, batches: Iterable[Batch]) -> None:
        """Captures the passes over the shapes of these batches, the most frequent ones if they are too many. Adds to
        gradients what means nothing. Raises torch.OutOfMemoryError.
        """
        examples: dict[tuple[object, ...], Batch] = {}
        times: Counter[tuple[object, ...]] = Counter()
        for batch in batches:
            if batch.input_ids.numel() <= self._most:
                examples.setdefault(_shape(batch), batch)
                times[_shape(batch)] += 1
        chosen = [key for key, _ in times.most_common(MOST_GRAPHS)]
        # The largest first: the others find their memory in what it took.
        for key in sorted(chosen, key=lambda key: examples[key].input_ids.numel(), reverse=True):
            if self.failed:
                return
            if not self._is_warm(key):
                forward_backward(self._objective, examples[key], SCALE)
                self._seen.add(key)
            self._record(key, examples[key])

    def forget(self) -> None:
        """Frees the memory of all recordings; passes that come later are recorded again."""
        self._recorded.clear()
        self._recorder.forget()

    @property
    def count(self) -> int:
        """How many passes have been recorded."""
        return len(self._recorded)

    def _is_warm(self, key: tuple[object, ...]) -> bool:
        """Whether batches of this shape can be captured: not before their kernels have been loaded."""
        if key in self._seen or self.failed:
            return not self.failed
        own = _kernels(key)
        return not self._each_warms_up and own is not None and own in map(_kernels, self._recorded)

    def _record(self, key: tuple[object, ...], batch: Batch) -> None:
        """Captures a pass over batches of this shape without running it. If that fails, nothing more is captured, or,
        if this was the shape's first batch, from now on each shape is warmed up.
        """
        if key in self._recorded or len(self._recorded) == MOST_GRAPHS:
            return
        release(batch.input_ids.device)  # what passes took so far: the recording takes as much beside it
        try:
            sums, replay = self._recorder.record(lambda: forward_backward(self._objective, batch, SCALE))
        except RuntimeError as error:
            if key not in self._seen:
                self._each_warms_up = True
                return
            log.warning(
                "this model's steps cannot be captured as CUDA graphs and run without them: %s",
                str(error).splitlines()[0],
            )
            self.failed = True
        else:
            self._recorded[key] = _Recorded(batch, sums, replay)
        finally:
            release(batch.input_ids.device)


def forward_backward(objective: Objective, batch: Batch, scale: float) -> Tensor:
    """Runs a forward and a backward pass; returns the method's sums in their order, "loss" times `scale`.

    Raises torch.OutOfMemoryError.
    """
    with objective.passing():
        sums = objective.sums(batch, scale)
        with accumulation.together():
            sums["loss"].backward()
    return torch.stack([sums[name].detach().double() for name in objective.method.sums])


def most_tokens(objective: Objective) -> int:
    """Returns the most tokens of a pass that is recorded."""
    idle = experts.idle(objective.causal.config.get_text_config(), _of_experts(objective))
    return most_recorded(all_and_trainable(objective.model)[0] - idle)


def worthwhile(objective: Objective, tokens: int, ranks: int = 1) -> bool:
    """Whether a rank's mean step has so few tokens that the host, not the GPU, limits its speed."""
    return reason_against(objective, tokens, ranks) is None


def reason_against(objective: Objective, tokens: int, ranks: int = 1) -> str | None:
    """Returns why a rank's steps of this many tokens are not recorded; None if they are."""
    trained = sum(p.nbytes for p in objective.parameters() if p.requires_grad)
    config = objective.causal.config.get_text_config()
    reasons = {
        "the method's passes differ from batch to batch": not objective.method.recordable,
        "its noise is drawn for rows of these lengths": objective.noise is not None,
        "not on a GPU": not next(objective.parameters()).is_cuda,
        "its weights are cut over the ranks": objective.is_sharded,
        f"more than {(most := most_tokens(objective)):,} tokens at once": tokens > most,
        "gradients are sent to the other GPUs while others are computed": ranks > 1 and trained > OVERLAPPED,
        "RoPE depends on the rows' lengths": bool(rope.of(objective.causal)),  # padding would change the lengths
        "activations are computed again with the same random numbers": objective.draws_again,
        "gradients need the memory of activations": objective.recomputes and trained > OVERLAPPED,
        "the experts' work depends on the batch": experts.are_in(config) and not _are_grouped(objective),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _are_grouped(objective: Objective) -> bool:
    """Whether all experts' products are grouped on the device; else the host reads each batch's routing."""
    products, taken = grouped.products(objective.model), grouped.weights_taken(objective.model)
    return products is not None and products["path"] == "grouped" and taken == _of_experts(objective)


def _of_experts(objective: Objective) -> int:
    """Returns the weights of all routed experts."""
    return sum(weight.numel() for weight in targets.experts(objective.causal).values())


def _shape(batch: Batch) -> tuple[object, ...]:
    """Returns everything that a captured pass treats as constant."""
    ends = None if batch.borders is None or batch.borders.ends is None else batch.borders.ends.shape
    longest = None if batch.borders is None else batch.borders.longest
    return batch.input_ids.shape, batch.label_positions.shape, batch.position_ids is not None, ends, longest


def _kernels(key: tuple[object, ...]) -> tuple[bool, int] | None:
    """Returns the same for keys of `_shape` whose concatenated rows have the same kernels; None for padded rows."""
    ends, longest = key[3:]
    if not isinstance(ends, torch.Size) or not isinstance(longest, int):
        return None
    return attention.kernels(ends.numel() - 1, longest)


def _copy(source: Batch, target: Batch) -> None:
    target.input_ids.copy_(source.input_ids)
    target.label_positions.copy_(source.label_positions)
    target.targets.copy_(source.targets)
    if source.position_ids is not None and target.position_ids is not None:
        target.position_ids.copy_(source.position_ids)
    if source.borders is not None and source.borders.ends is not None:
        assert target.borders is not None
        assert target.borders.ends is not None
        target.borders.ends.copy_(source.borders.ends)
