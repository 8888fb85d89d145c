"""Predicts the memory plan that the trainer would choose for a run on a device, and what it then allocates.

It follows `worker/trainer/preflight.py`, which measures what is estimated here: as many tokens at once as fit, without
recomputation; if those are too few, with all activations recomputed; else no plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunery.planning import peak
from tunery.planning.peak import Estimate, Parts, Setting, Step
from tunery.spec import Lora, Sharding, Technique

CPU_MICRO_BATCH = 1024
"""Tokens of a CPU micro-batch. Larger ones are no faster: the matrix products fill the cores, and padding grows."""
GPU_TOKENS = 32_768
"""Maximum tokens of a GPU micro-batch. A few thousand keep a GPU busy."""
LEAST_TOKENS = 2_048
"""Minimum tokens of a GPU micro-batch: below it the GPU is poorly used, and activations are recomputed instead (about
1.3 times the work, a tenth of the memory)."""
HEADROOM = 0.9
"""Share of the free memory planned for activations; the rest is for the allocator's fragmentation."""
RECORDED_PARAMS, RECORDED_TOKENS = 2_000_000_000, 8_192
"""Limits for CUDA graphs. Beyond them a step is limited by the GPU, not by Python: graphs gain little and keep
memory."""
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
    return made if made.estimate.bytes <= capacity else None


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


def choose_sharding(
    model_info: Mapping[str, Any], technique: Technique, *, gpus: int, capacity: int, asked: Sharding, **of_run: Any
) -> Literal["replicate", "full_shard"]:
    """Returns how a run uses several devices of `capacity` bytes: as requested, or sharded if a whole copy does not
    fit. `of_run`: as in `run`.
    """
    if asked != "auto":
        return asked
    if gpus == 1 or of_run.get("device") == "cpu":
        return "replicate"
    return "replicate" if runs(model_info, technique, capacity=capacity, **of_run) else "full_shard"


def tokens_in(free: int, bytes_a_token: float, kept: int) -> int:
    """Returns how many tokens' activations fit into `free` bytes less `kept` ones, which are allocated later."""
    return max(0, int(HEADROOM * (free - kept) / max(1.0, bytes_a_token)))


def _on_cpu(load: Load) -> Step:
    tokens = min(load.step, max(CPU_MICRO_BATCH, load.longest))
    return _step(load, tokens, accumulates=load.step > tokens)


def _on_gpu(s: Setting, load: Load, capacity: int) -> Step | None:
    wanted = min(load.step, GPU_TOKENS)
    for recompute in (True,) if s.ranks > 1 else (False, True):
        fits = _tokens_that_fit(s, load.longest, capacity, recompute=recompute)
        if fits >= (load.longest if recompute else max(load.longest, min(wanted, LEAST_TOKENS))):
            tokens = max(load.longest, min(wanted, fits))
            graphs = not recompute and _is_recorded(s, tokens)
            return _step(load, tokens, recompute=recompute, graphs=graphs, accumulates=load.step > tokens)
    return None


def _step(load: Load, tokens: int, **how: bool) -> Step:
    """Returns the step whose largest micro-batch has as many whole examples as fit into `tokens`."""
    tokens = min(tokens, load.step) if tokens >= load.step else max(1, tokens // load.longest) * load.longest
    labels = tokens if load.labels is None else min(tokens, load.labels)
    return Step(tokens, labels, **how)


def _tokens_that_fit(s: Setting, longest: int, capacity: int, *, recompute: bool) -> int:
    """Returns how many tokens fit, extrapolated from the peak of one example as in the trainer's probe."""
    one = next(peak.phases(s, Step(longest, longest, recompute=recompute)))
    of_pass = sum(one[name] for name in _PASS)
    rest = sum(size for name, size in one.items() if name not in (*_PASS, "gradients", "gathered"))
    gradients = s.cut(s.gradient_bytes) if s.is_full else s.gradient_bytes
    free = capacity - PROCESS_BYTES[s.device] - rest
    return tokens_in(free, of_pass / longest, gradients + one["gathered"])


def _is_recorded(s: Setting, tokens: int) -> bool:
    """Whether passes are recorded as CUDA graphs, assuming that method and RoPE can be recorded."""
    return s.shape.params <= RECORDED_PARAMS and tokens <= RECORDED_TOKENS and not s.shape.experts


def _with_check(s: Setting, step: Step, load: Load, capacity: int) -> Step:
    """Returns the step with the comparison of files at the run's end, if the model is small enough and it fits."""
    room = capacity - PROCESS_BYTES[s.device] - _bytes(peak.at_rest(s)) - s.gradient_bytes
    small = s.shape.params <= peak.MOST_CHECKED and s.ranks == 1
    if not small or room < peak.CHECKED_BYTES * s.shape.params:
        return step
    return replace(step, prompt=min(load.longest, peak.MOST_PROMPT))


def _bytes(parts: Parts) -> int:
    return sum(parts.values())
