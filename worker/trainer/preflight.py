"""Makes the memory plan before the first step, by trying the largest work of the run.

The optimizer's state is created first, by a step that changes nothing, so that no later step can run out of memory for
it half-way. On a GPU passes over the longest sequence and the evaluation of the longest validation row are measured.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch

from tunery.failures import DoesNotFit
from tunery.planning.expected import (
    CPU_MICRO_BATCH,
    GPU_TOKENS,
    MEASURED,
    Load,
    Needs,
    Split,
    fastest,
    fixed_bytes,
    room_of,
    split,
    split_recorded,
    tokens_in,
    whole_step,
)
from tunery.spec import Qlora, Technique
from worker.trainer import embeddings, sharding
from worker.trainer.cuda_graphs import forward_backward, most_tokens, worthwhile
from worker.trainer.data import Example, Row, collate
from worker.trainer.memory import MemoryPlan
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """The largest work of a run on one rank; lengths in tokens."""

    technique: Technique
    rows_a_step: int
    mean_step: int  # all tokens of a mean step
    row: int  # the longest training example
    sequence: int  # the longest sequence: several examples when packing
    packs: bool
    validation: Example | None = None  # the longest validation example
    rows_an_example: int = 1
    ranks: int = 1

    @property
    def usual(self) -> Load:
        """The mean sizes."""
        return Load(max(1, self.mean_step // self.rows_a_step), self.mean_step)


def fit_micro_batch(
    objective: Objective, optimizer: torch.optim.Optimizer, rows: Sequence[Row], work: Work, ranks: Ranks | None = None
) -> MemoryPlan:
    """Returns the memory plan that fits, with its recomputation turned on. Raises DoesNotFit.

    `ranks`: those over which the model is sharded, which use the same plan.
    """
    device = next(objective.parameters()).device
    if not _made_state(optimizer) and not (embeddings.move_to_host(objective) and _made_state(optimizer)):
        raise _does_not_fit(work, "The optimizer's state", device)
    if device.type != "cuda":
        objective.recompute(objective.layers if objective.is_sharded else 0)  # as on GPUs: see _cut
        plan = MemoryPlan(max(CPU_MICRO_BATCH, work.sequence), recompute=objective.recomputes)
    else:
        plan = _measured(objective, rows, work, device) if ranks is None else _cut(objective, rows, work, ranks)
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak: not that of passes that did not fit
    if objective.knows_borders:
        plan = replace(plan, packed_tokens=plan.max_tokens)
    elif work.packs:
        plan = replace(plan, packed_tokens=min(work.sequence, plan.max_tokens))
    return plan


def _made_state(optimizer: torch.optim.Optimizer) -> bool:
    """Creates the optimizer's state; returns whether it fits."""
    try:
        make_state(optimizer)
    except torch.OutOfMemoryError:
        return False
    return True


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the optimizer's state by a step at rate 0 on gradients of 0, which changes no weights or moments.

    The step is not counted. Raises torch.OutOfMemoryError.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for state in optimizer.state.values():
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def _measured(objective: Objective, rows: Sequence[Row], work: Work, device: torch.device) -> MemoryPlan:
    wanted = work.rows_a_step * work.sequence
    for length in dict.fromkeys((work.sequence, work.row)):  # a packed sequence may be shorter, a row may not
        example = _example(rows, length, work.rows_an_example)
        probe = _Probe(objective, example, work.validation, device)
        load = Load(length, min(wanted, GPU_TOKENS))
        space = _space(probe, load, work)
        found = _fastest(probe, space, load, work, is_step=wanted == load.step)
        if found is not None:
            recorded = _recorded(probe, space, found, load, work)
            chosen = recorded or found
            objective.recompute(chosen.recompute, offload=chosen.offload)
            return MemoryPlan(
                chosen.tokens,
                recompute=chosen.recompute,
                offload=chosen.offload,
                graphs=recorded is not None,
                host_embedding=embeddings.are_on_host(objective.causal),
            )
    raise _does_not_fit(work, f"A {work.technique.type} step on a row of {work.row} tokens", device)


@dataclass(frozen=True)
class _Space:
    """The bytes that activations may take, and those that passes need, as measured."""

    room: float
    needs: Needs

    def holds(self, tokens: int) -> bool:
        """Whether passes over so many tokens need no recomputation."""
        return not self.needs.layers or self.needs.none * tokens <= self.room


def _space(probe: "_Probe", load: Load, work: Work) -> _Space:
    """Returns measurements of the longest example and of two; fewer if the step fits at once as it is. Moves the input
    embedding if layers would be recomputed.
    """
    evaluation, none = probe.evaluation() / load.longest, probe.peak(0) / load.longest
    room = probe.room()  # after a pass, which frees what torch has reserved and nothing uses
    space = _Space(room, Needs(probe.objective.layers, none=none, evaluation=evaluation))
    if space.holds(load.step):
        return space
    space = replace(space, needs=probe.needs(space.needs, load.longest))
    found = split(space.room, space.needs, load, unpacks=probe.unpacks, usual=work.usual)
    if (found is None or found.recompute) and embeddings.move_to_host(probe.objective):
        return _space(probe, load, work)  # with the passes that did not fit before
    log.info("%.1f MiB for activations; bytes: %s", space.room / 2**20, space.needs)
    return space


def _fastest(probe: "_Probe", space: _Space, load: Load, work: Work, *, is_step: bool) -> Split | None:
    """Returns the fastest split that fits. `is_step`: the load is a whole step."""
    needs, tokens = space.needs, load.step
    found = split(space.room, needs, load, unpacks=probe.unpacks, usual=work.usual)
    if space.holds(tokens) or not probe.is_full or not is_step:
        return found
    whole = whole_step(needs.layers, tokens, lambda recompute: probe.step_fits(recompute, tokens, needs.evaluation))
    return fastest((found, whole), needs.layers, work.usual, unpacks=probe.unpacks)


def _recorded(probe: "_Probe", space: _Space, found: Split, load: Load, work: Work) -> Split | None:
    """Returns the fastest split whose passes are recorded, in place of `found`; None if they gain nothing from it or
    do not fit beside the recordings.
    """
    objective = probe.objective
    limit = most_tokens(objective)
    chosen = split_recorded(space.room, space.needs, found, limit, load, unpacks=probe.unpacks, usual=work.usual)
    if chosen is None:
        return None
    objective.recompute(chosen.recompute, offload=chosen.offload)
    return chosen if worthwhile(objective, min(found.tokens, work.mean_step), work.ranks) else None


@dataclass(frozen=True)
class _Probe:
    """Measures passes over the longest example, in bytes; infinite if a pass does not fit."""

    objective: Objective
    longest: Example
    validation: Example | None
    device: torch.device

    @property
    def unpacks(self) -> bool:
        return any(getattr(p, "quant_state", None) is not None for p in self.objective.parameters())

    @property
    def is_full(self) -> bool:
        return all(p.requires_grad for p in self.objective.parameters())

    def needs(self, known: Needs, length: int) -> Needs:
        """Returns what is `known` with the bytes of passes that recompute; `length`: of the longest example."""
        layers = known.layers
        kept, inputs = min(MEASURED, layers), self.inputs()
        two = self.peak(layers, examples=2)
        every, fixed = self.peak(layers), 0.0
        if math.isfinite(every):
            fixed = fixed_bytes(every, two)
        else:
            every = self.peak(layers, offload=True) + length * inputs * max(0, layers - 2) / layers
        one, several = self.peak(layers - 1), self.peak(layers - kept)
        return replace(
            known,
            none=known.none - fixed / length,
            all=(every - fixed) / length,
            one=(one - fixed) / length,
            layer=max(0.0, several - one) / (kept - 1) / length if math.isfinite(several) and kept > 1 else math.inf,
            inputs=inputs,
            fixed=fixed,
        )

    def peak(self, recompute: int, *, offload: bool = False, examples: int = 1, accumulates: bool = True) -> float:
        """Returns the bytes of a forward and a backward pass over so many examples, with the first `recompute` layers
        recomputed: with those of the gradients only if there are none from a micro-batch before.
        """
        self.objective.recompute(recompute, offload=offload)
        measure = partial(_peak, self.objective, [self.longest] * examples, self.device, accumulates=accumulates)
        return _undone(measure, self.objective, self.device)

    def step_fits(self, recompute: int, tokens: int, evaluation: float) -> bool:
        """Whether a whole step fits at once, with the first `recompute` layers recomputed, and as many tokens of an
        evaluation, which takes so many bytes for each.
        """
        step = self.peak(recompute, examples=-(-tokens // len(self.longest)), accumulates=False)
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(step, evaluation * tokens) <= room_of(free, 0)

    def evaluation(self) -> float:
        """Returns the bytes of evaluating as many tokens as the longest example has; 0 without validation examples."""
        example = self.validation
        if example is None:
            return 0.0
        measure = partial(_peak_of_evaluation, self.objective, example, self.device)
        return _undone(measure, self.objective, self.device) * len(self.longest) / len(example)

    def inputs(self) -> float:
        """Returns the bytes per token of all layers' inputs."""
        width: int = self.objective.causal.config.get_text_config().hidden_size
        return self.objective.layers * width * _kept_in(self.objective).itemsize

    def room(self) -> float:
        free, _ = torch.cuda.mem_get_info(self.device)
        return room_of(free, _gradients(self.objective))


def _kept_in(objective: Objective) -> torch.dtype:
    """Returns the type of the layers' inputs."""
    found: torch.dtype = objective.causal.get_input_embeddings().weight.dtype
    return found


def _gradients(objective: Objective) -> int:
    return sum(sharding.bytes_here(p) for p in objective.parameters() if p.requires_grad)


def _undone(measure: Callable[[], int], objective: Objective, device: torch.device) -> float:
    """Returns the bytes of a measurement that leaves no trace; infinite if it runs out of memory.

    Raises torch.OutOfMemoryError if the model is sharded, as the other ranks cannot continue.
    """
    random, random_gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    try:
        found: float = measure()
    except torch.OutOfMemoryError:
        if objective.is_sharded:
            raise
        found = math.inf
    objective.train()
    objective.rest()
    objective.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.set_rng_state(random)
    torch.cuda.set_rng_state(random_gpu, device)
    return found


def _cut(objective: Objective, rows: Sequence[Row], work: Work, ranks: Ranks) -> MemoryPlan:
    """Returns the plan of a sharded model: with recomputation, which saves most of the memory that can be saved.

    Why not try without it: if one rank ran out of memory, the others would wait in the middle of a pass.
    """
    wanted, device = min(work.rows_a_step * work.sequence, GPU_TOKENS), ranks.device
    longest, what = max(work.sequence, work.row), f"A {work.technique.type} step on a row of {work.row} tokens"
    probe = _Probe(objective, _example(rows, longest, work.rows_an_example), work.validation, device)
    gathered = sharding.gathered_bytes(objective.causal)
    try:
        peak = probe.peak(objective.layers)
        a_token = max(peak - gathered, peak / 4, probe.evaluation()) / longest
    except torch.OutOfMemoryError:
        raise _does_not_fit(work, what, device) from None
    free, _ = torch.cuda.mem_get_info(device)
    fits = -ranks.most(-tokens_in(free, a_token, _gradients(objective) + gathered))
    log.info("%d tokens fit at once beside a shard of the model", fits)
    if fits < longest:
        raise _does_not_fit(work, what, device)
    return MemoryPlan(max(longest, min(wanted, fits)), recompute=objective.layers)


def _does_not_fit(work: Work, what: str, device: torch.device) -> DoesNotFit:
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return DoesNotFit(
        what=what,
        needed="more memory than the model leaves free",
        device="GPU",
        capacity=f"{total / 2**30:.0f} GiB",
        instead="Lower max_seq_length, or use a smaller base or a larger GPU."
        if isinstance(work.technique, Qlora)
        else "Lower max_seq_length, or use technique 'qlora'.",
    )


def _peak(objective: Objective, examples: Sequence[Example], device: torch.device, *, accumulates: bool = True) -> int:
    """Returns the peak bytes of a forward and a backward pass.

    If it `accumulates`, the gradients of the trained weights are there before, and not counted.
    """
    objective.train()
    objective.rest()
    for parameter in objective.parameters():
        if parameter.requires_grad and accumulates:
            parameter.grad = torch.zeros_like(parameter)
    # One behind the other where a model knows their borders, as in a step; else beside each other.
    places = [[*range(len(examples))]] if objective.knows_borders else [[place] for place in range(len(examples))]
    batch = collate(examples, places, device, objective.pad_to, borders=objective.knows_borders)
    resting = _reset_peak(device)
    forward_backward(objective, batch, 1.0 / len(examples[0]))
    return _peak_since(device) - resting


@torch.no_grad()
def _peak_of_evaluation(objective: Objective, example: Example, device: torch.device) -> int:
    """Returns the peak bytes of evaluating an example."""
    objective.eval()
    objective.rest()
    batch = collate([example], [[0]], device, objective.pad_to, borders=objective.knows_borders)
    resting = _reset_peak(device)
    objective.sums(batch, 1.0)
    return _peak_since(device) - resting


def _reset_peak(device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_since(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _example(rows: Sequence[Row], length: int, count: int) -> Example:
    """Returns an example of `length` tokens of the data in `count` rows, all labelled: the most expensive one."""
    ids = [token for row in rows[: length + 1] for token in row.input_ids]
    ids = (ids * (length // len(ids) + 1))[:length]
    cuts = [length * number // count for number in range(count + 1)]
    return Example(tuple(Row(ids[start:end], ids[start:end]) for start, end in pairwise(cuts)))
