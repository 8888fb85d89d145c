"""Predicts the memory plan that the trainer would choose for a run on a device, and what it then allocates.

It follows `worker/trainer/preflight.py`, which measures what is estimated here. Both choose how a step is split by
`split`: the fastest of the splits that fit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunery.planning import activations, peak
from tunery.planning.peak import Estimate, Parts, Setting, Step
from tunery.spec import Full, Lora, Qlora, Sharding, Technique

CPU_MICRO_BATCH = 1024
"""Tokens of a CPU micro-batch. Larger ones are no faster: the matrix products fill the cores, and padding grows."""
GPU_TOKENS = 32_768
"""Maximum tokens of a GPU micro-batch. A few thousand keep a GPU busy."""
RECOMPUTED = 0.35
"""Time of recomputing all activations, as a share of a step without it: two operations a weight where a frozen base has
four, without the last product of each layer."""
OFFLOADED = 0.05
"""Time of copying all layers' inputs to the host and back, as a share of a step: the copies run beside it. A guess."""
PASSES = {False: 120, True: 480}
"""Time of a micro-batch beside that of its tokens, in tokens; True: of four-bit weights, which each pass unpacks.
Estimates: a pass unpacks an 8B base in about the time of 160 tokens, and a step has two passes or three."""
MOST_OFFLOADED = 8 * 2**30
"""Maximum bytes of layers' inputs in the host's memory: they are pinned, so that no other process can have it."""
MEASURED = 3
"""Kept layers with which the need of a layer is measured, beside that with one."""
HEADROOM = 0.9
"""Share of the free memory planned for activations; the rest is for the allocator's fragmentation."""
RECORDED_TOKENS, RECORDED_WORK = 8_192, 25 * 10**12
"""Limits for passes recorded as CUDA graphs: tokens, and tokens times weights. Beyond them a pass is limited by the
GPU, not by Python: graphs gain little and keep memory."""
RECORDING_BYTES = 128 * 2**20
"""What recordings take beside activations: cuBLAS works in memory of their own, and the driver keeps every launch. On
an H200 passes of a 7B model were recorded where they left 176 MiB."""
OVERLAPPED = 2**28
"""Bytes of gradients above which several ranks gain more by sending them during a pass than by recording it; and above
which they leave activations no room where layers are recomputed, as they stay between recorded passes."""
PROCESS_BYTES = {"cuda": 500_000_000, "cpu": 600_000_000}
"""Memory beside the allocations: the GPU's context, or on a CPU the process with its libraries."""
BATCH = 8
"""Assumed examples of a step."""
_PASS = ("activations", "experts", "head")


@dataclass(frozen=True)
class Load:
    """The largest sizes that a run's rows can have, in tokens. `longest`: of one example; `step`: of all examples of
    one rank's step; `labels`: the learned ones among those, None: all.
    """

    longest: int
    step: int
    labels: int | None = None


@dataclass(frozen=True)
class Expected:
    """How the trainer would run a step, and its peak memory. The part `fixed` is not allocated by the run."""

    step: Step
    estimate: Estimate

    @property
    def allocated(self) -> int:
        return self.estimate.bytes - self.estimate.parts["fixed"]


def plan(s: Setting, load: Load, capacity: int) -> Expected | None:
    """Returns the plan for a device with `capacity` bytes; None if the trainer would find none."""
    step = _on_cpu(load) if s.device == "cpu" else _on_gpu(s, load, capacity)
    if step is None:
        return None
    found = peak.peak(s, _with_check(s, step, load, capacity))
    made = Expected(step, Estimate(found.parts | {"fixed": PROCESS_BYTES[s.device]}))
    least = max(made.estimate.bytes, PROCESS_BYTES[s.device] + peak.loaded(s).bytes)
    return made if least <= capacity else None


def run(
    model_info: Mapping[str, Any],
    technique: Technique,
    *,
    max_seq_length: int,
    capacity: int,
    device: str = "cuda",
    rows: int = 1,
    optimizer: str = "adamw",
    ranks: int = 1,
    batch: int = BATCH,
) -> Expected | None:
    """Returns the plan of a run whose examples all have the maximum length. Arguments as in `memory.estimate`.

    `batch`: examples of a step on one device.
    """
    longest = max_seq_length * rows
    load = Load(longest, batch * longest)
    return plan(Setting.of(model_info, technique, device, optimizer, ranks), load, capacity)


def runs(model_info: Mapping[str, Any], technique: Technique, *, capacity: int, **of_run: Any) -> bool:
    """Whether the trainer would find a plan. `of_run`: as in `run`."""
    return run(model_info, technique, capacity=capacity, **of_run) is not None


def bf16_runs(model_info: Mapping[str, Any], *, capacity: int, **of_run: Any) -> bool:
    """Whether plain LoRA has a plan; if so, 4 bits and their loss of quality are not the default."""
    return runs(model_info, Lora(), capacity=capacity, **of_run)


def can_shard(technique: Technique) -> bool:
    """Whether the trainer can shard the model: PEFT's DoRA computes norms of whole layers, and unpacks four-bit ones by
    a state that their pieces do not have.
    """
    return not (isinstance(technique, Qlora) and technique.use_dora)


def choose_sharding(
    model_info: Mapping[str, Any], technique: Technique, *, gpus: int, capacity: int, asked: Sharding, **of_run: Any
) -> Literal["replicate", "full_shard"]:
    """Returns how a run uses several devices of `capacity` bytes: as requested, or sharded if a whole copy does not
    fit. `of_run`: as in `run`.
    """
    if asked != "auto":
        return asked
    if gpus == 1 or of_run.get("device") == "cpu" or not can_shard(technique):
        return "replicate"
    return "replicate" if runs(model_info, technique, capacity=capacity, **of_run) else "full_shard"


@dataclass(frozen=True)
class Needs:
    """Bytes of a micro-batch on a GPU, of a model of `layers` layers: `fixed` however many tokens, and for each token:

    `none`: without recomputation; `all`: with all layers recomputed; `one`: with all but one; `layer`: more for each
    other layer whose activations are kept; `inputs`: of all layers' inputs; `evaluation`: of measuring the loss.
    Infinite if a single example does not fit.
    """

    layers: int
    none: float
    all: float = math.inf
    one: float = math.inf
    layer: float = math.inf
    inputs: float = 0.0
    evaluation: float = 0.0
    fixed: float = 0.0

    def of(self, recompute: int, *, offload: bool) -> float:
        """Returns the bytes per token with the first `recompute` layers recomputed."""
        if not recompute:
            return self.none
        others = self.layers - recompute - 1
        beside = self.one + others * self.layer if others > 0 else self.one if others == 0 else self.all
        # Two inputs are on the device: of the layer that is computed, and of the next one, which is being copied.
        return beside - (self.inputs * max(0, recompute - 2) / self.layers if offload else 0)


@dataclass(frozen=True)
class Split:
    """How a step is split: `tokens` of a micro-batch, how many layers are recomputed, and whether these offload."""

    tokens: int
    recompute: int = 0
    offload: bool = False


def split(
    room: float, needs: Needs, load: Load, *, unpacks: bool, usual: Load | None = None, most: int | None = None
) -> Split | None:
    """Returns the fastest way to compute a step in `room` bytes; None if not even its longest example fits.

    `unpacks`: the base is in four bits. `usual`: the mean sizes, by which times are judged, if others than `load`'s.
    `most`: tokens of a micro-batch. Where several are as fast, the one that recomputes and offloads least.
    """
    return fastest(_splits(room, needs, load, most or load.step), needs.layers, usual or load, unpacks=unpacks)


def split_recorded(
    room: float, needs: Needs, found: Split, limit: int, load: Load, *, unpacks: bool, usual: Load | None = None
) -> Split | None:
    """Returns the fastest way to compute a step in passes that are recorded, no larger than those of `found` and of up
    to `limit` tokens, unless one example has more; None if not even that fits beside the recordings.
    """
    # Larger micro-batches would pass without a graph, in memory beside that which the graphs keep.
    most = max(load.longest, min(found.tokens, limit))
    return split(room - RECORDING_BYTES, needs, load, unpacks=unpacks, usual=usual, most=most)


def fastest(found: Iterable[Split | None], layers: int, usual: Load, *, unpacks: bool) -> Split | None:
    """Returns the fastest split for a model of so many layers; None if there is none."""
    splits = [each for each in found if each is not None]
    return min(splits, key=lambda each: _time(each, layers, usual, unpacks=unpacks), default=None)


def whole_step(layers: int, tokens: int, fits: Callable[[int], bool]) -> Split | None:
    """Returns a split in which all `tokens` of a step pass the model at once, with the fewest recomputed layers, at
    least one; None if they do not fit. `fits`: whether they do with so many.

    No gradients wait for the next micro-batch: they are allocated while activations are freed. For a full fine-tune,
    whose gradients are as large as the model, that is room for more.
    """
    least, most = 1, layers
    if not layers or not fits(layers):
        return None
    while least < most:
        middle = (least + most) // 2
        if fits(middle):
            most = middle
        else:
            least = middle + 1
    return Split(tokens, most)


def _splits(room: float, needs: Needs, load: Load, wanted: int) -> Iterator[Split]:
    left = max(0.0, room - needs.fixed)
    for offload in (False, True):
        for recompute in range(offload, needs.layers + 1):
            most = int(min(left / max(1.0, each) for each in (needs.of(recompute, offload=offload), needs.evaluation)))
            if offload:
                most = min(most, int(MOST_OFFLOADED / max(1.0, needs.inputs * recompute / needs.layers)))
            if most >= load.longest:
                yield Split(max(load.longest, min(wanted, most)), recompute, offload)


def _time(found: Split, layers: int, usual: Load, *, unpacks: bool) -> float:
    """Returns the time of a step, as a share of that without recomputation in one large micro-batch."""
    share = found.recompute / max(1, layers)
    copies = OFFLOADED * share if found.offload else 0.0
    # Of whole examples: what is a little too small for all of them takes as many passes as what holds half.
    passes = -(-usual.step // _whole_examples(usual, found.tokens))
    return 1 + RECOMPUTED * share + copies + PASSES[unpacks] * (1 + share / 2) * passes / usual.step


def _whole_examples(load: Load, tokens: int) -> int:
    """Returns the tokens of as many whole examples as fit into `tokens`, at least one; of the step's at most."""
    return load.step if tokens >= load.step else max(1, tokens // load.longest) * load.longest


def room_of(free: int, kept: int) -> float:
    """Returns how many of `free` bytes activations may take, beside `kept` ones that are allocated later."""
    return HEADROOM * (free - kept)


def tokens_in(free: int, bytes_a_token: float, kept: int) -> int:
    """Returns how many tokens' activations fit into `free` bytes less `kept` ones, which are allocated later."""
    return max(0, int(room_of(free, kept) / max(1.0, bytes_a_token)))


def _on_cpu(load: Load) -> Step:
    tokens = min(load.step, max(CPU_MICRO_BATCH, load.longest))
    return _step(load, tokens, accumulates=load.step > tokens)


def _on_gpu(s: Setting, load: Load, capacity: int) -> Step | None:
    room, needs, moves = _room(s, load, capacity), _needs(s, load.longest), False
    at_once = replace(load, step=min(load.step, GPU_TOKENS))
    if s.ranks > 1:
        fits = int(max(0.0, room - needs.fixed) / max(1.0, needs.all))
        tokens = max(load.longest, min(at_once.step, fits))
        found = Split(tokens, s.shape.layers) if fits >= load.longest else None
    else:
        found = split(room, needs, at_once, unpacks=s.precision.quantised)
        moves = s.movable_bytes > 0 and (found is None or found.recompute > 0)
        if moves:
            room += HEADROOM * s.movable_bytes
            found = split(room, needs, at_once, unpacks=s.precision.quantised)
        if s.is_full and at_once == load and (found is None or found.recompute or found.tokens < load.step):
            found = fastest((found, _whole_step(s, load, capacity)), s.shape.layers, load, unpacks=False)
    if found is None:
        return None
    recorded = _recorded(s, load, room, needs, found)
    chosen = recorded or found
    how = {"recompute": chosen.recompute, "offload": chosen.offload, "host_embedding": moves}
    return _step(load, chosen.tokens, accumulates=load.step > chosen.tokens, graphs=recorded is not None, **how)


def _recorded(s: Setting, load: Load, room: float, needs: Needs, found: Split) -> Split | None:
    """Returns the split whose passes are recorded as CUDA graphs, in place of `found`; None if they are not.

    Assumes that method and RoPE can be recorded.
    """
    most = most_recorded(s.shape.active)
    if s.ranks > 1 or (s.shape.experts and not _are_grouped(s)) or min(found.tokens, load.step) > most:
        return None
    chosen = split_recorded(room, needs, found, most, load, unpacks=s.precision.quantised)
    return chosen if chosen is not None and (not chosen.recompute or _recomputes_alone(s)) else None


def _are_grouped(s: Setting) -> bool:
    """Whether the host need not read to which experts a batch is routed."""
    adapts_all = isinstance(s.technique, Lora) and s.technique.target_modules == "all-linear"
    return adapts_all and s.shape.unmerged == s.shape.experts and s.precision.dense == "bfloat16"


def _step(load: Load, tokens: int, **how: Any) -> Step:
    """Returns the step whose largest micro-batch has as many whole examples as fit into `tokens`."""
    tokens = _whole_examples(load, tokens)
    labels = tokens if load.labels is None else min(tokens, load.labels)
    return Step(tokens, labels, **how)


def _room(s: Setting, load: Load, capacity: int) -> float:
    """Returns the bytes for activations on a device with `capacity` bytes."""
    one = next(peak.phases(s, Step(load.longest, load.longest, recompute=s.shape.layers)))
    rest = sum(size for name, size in one.items() if name not in (*_PASS, "gradients", "gathered"))
    gradients = s.cut(s.gradient_bytes) if s.is_full else s.gradient_bytes
    return room_of(capacity - PROCESS_BYTES[s.device] - rest, gradients + one["gathered"])


def _whole_step(s: Setting, load: Load, capacity: int) -> Split | None:
    rest = sum(peak.at_rest(s).values())
    room = room_of(capacity - PROCESS_BYTES[s.device] - rest, 0)

    def fits(recompute: int) -> bool:
        return peak.peak(s, _step(load, load.step, recompute=recompute)).bytes - rest <= room

    return whole_step(s.shape.layers, load.step, fits)


def _needs(s: Setting, longest: int) -> Needs:
    """Returns the bytes per token, extrapolated from the peak of one example as in the trainer's probe."""
    layers = s.shape.layers

    def of(recompute: int, examples: int = 1) -> float:
        tokens = examples * longest
        one = next(peak.phases(s, Step(tokens, tokens, recompute=recompute)))
        return float(sum(one[name] for name in _PASS))

    kept = min(MEASURED, layers)
    fixed = fixed_bytes(of(layers), of(layers, 2))
    none, every, one, several = ((of(n) - fixed) / longest for n in (0, layers, max(0, layers - 1), layers - kept))
    layer = (several - one) / max(1, kept - 1)
    return Needs(layers, none, every, one, layer, peak.inputs_bytes(s, layers), fixed=fixed)


def fixed_bytes(one: float, two: float) -> float:
    """Returns the bytes that do not depend on the number of tokens, from the peaks of one example and of two: of the
    loss, which is computed in chunks, and of the gradient of a trained head.
    """
    return max(0.0, 2 * one - two) if math.isfinite(two) else 0.0


def _recomputes_alone(s: Setting) -> bool:
    """Whether recomputed layers are recorded: they draw no random numbers, and gradients are small."""
    if isinstance(s.technique, Full) or s.technique.dropout or s.gradient_bytes > OVERLAPPED:
        return False
    return activations.find_path(s.shape, s.technique, s.precision) == "fused"


def most_recorded(active: int) -> int:
    """Returns the most tokens of a pass that is recorded, for a model of which each passes so many weights."""
    return min(RECORDED_TOKENS, RECORDED_WORK // max(1, active))


def _with_check(s: Setting, step: Step, load: Load, capacity: int) -> Step:
    """Returns the step with the comparison of files at the run's end, if the model is small enough and it fits."""
    room = capacity - PROCESS_BYTES[s.device] - _bytes(peak.at_rest(s)) - s.gradient_bytes
    small = s.shape.params <= peak.MOST_CHECKED and s.ranks == 1
    if not small or room < peak.CHECKED_BYTES * s.shape.params:
        return step
    return replace(step, prompt=min(load.longest, peak.MOST_PROMPT))


def _bytes(parts: Parts) -> int:
    return sum(parts.values())
