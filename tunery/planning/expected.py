"""The memory plan that the trainer would choose for a run on a device of some size, and what it then allocates.

It follows `worker/trainer/preflight.py`, which measures what is reckoned here: as many tokens at once as there is room
for, nothing recomputed; where that are few, all activations recomputed; else no plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunery.planning import peak
from tunery.planning.peak import Estimate, Parts, Setting, Step
from tunery.spec import Lora, Sharding, Technique

CPU_MICRO_BATCH = 1024
"""Tokens of a CPU micro-batch. Larger ones are no faster: the products fill the cores, and padding grows."""
GPU_TOKENS = 32_768
"""Most tokens of a GPU micro-batch. A GPU is busy from a few thousand on."""
LEAST_TOKENS = 2_048
"""Below this many tokens a micro-batch wastes a GPU; then activations are recomputed instead (about 1.3 times the work,
a tenth of the memory)."""
HEADROOM = 0.9
"""Share of the memory left for activations to plan with: the allocator's blocks never fit together perfectly."""
RECORDED_PARAMS, RECORDED_TOKENS = 2_000_000_000, 8_192
"""Beyond these a step's products take longer than Python does, and a graph would gain little and keep memory."""
PROCESS_BYTES = {"cuda": 500_000_000, "cpu": 600_000_000}
"""Beside what is allocated: a GPU's context, or a process with its libraries on a CPU."""
BATCH = 8
"""Examples of a step, where the run does not say."""
_PASS = ("activations", "experts", "head")


@dataclass(frozen=True)
class Load:
    """The most that a run's rows ask of a device; lengths in tokens. `step`: of a rank's examples of a step together.

    `labels`: of those, the tokens that are learned; None: all.
    """

    longest: int
    step: int
    labels: int | None = None


@dataclass(frozen=True)
class Expected:
    """How the trainer would take a step, and the peak that it then has. `fixed` is no part of what is allocated."""

    step: Step
    estimate: Estimate

    @property
    def allocated(self) -> int:
        return self.estimate.bytes - self.estimate.parts["fixed"]


def plan(s: Setting, load: Load, capacity: int) -> Expected | None:
    """Returns the plan for a device with `capacity` bytes; None where the trainer would find none."""
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
    """Returns the plan of a run whose every example is as long as it may be. Arguments as of `memory.estimate`.

    `batch`: examples of a step on one device.
    """
    longest = max_seq_length * rows
    load = Load(longest, batch * longest)
    return plan(Setting.of(model_info, technique, device, optimizer, ranks), load, capacity)


def runs(model_info: Mapping[str, Any], technique: Technique, *, capacity: int, **of_run: Any) -> bool:
    """Whether the trainer would find a plan. `of_run`: as of `run`."""
    return run(model_info, technique, capacity=capacity, **of_run) is not None


def bf16_runs(model_info: Mapping[str, Any], *, capacity: int, **of_run: Any) -> bool:
    """Whether a plain LoRA has a plan, so that nobody who asks for no technique pays for 4 bits with quality."""
    return runs(model_info, Lora(), capacity=capacity, **of_run)


def choose_sharding(
    model_info: Mapping[str, Any], technique: Technique, *, gpus: int, capacity: int, asked: Sharding, **of_run: Any
) -> Literal["replicate", "full_shard"]:
    """How a run uses several devices of `capacity` bytes: as asked, or in pieces where a whole copy does not fit.

    `of_run`: as of `run`.
    """
    if asked != "auto":
        return asked
    if gpus == 1 or of_run.get("device") == "cpu":
        return "replicate"
    return "replicate" if runs(model_info, technique, capacity=capacity, **of_run) else "full_shard"


def tokens_in(free: int, bytes_a_token: float, kept: int) -> int:
    """Returns tokens whose activations fit into `free` bytes beside the `kept` ones, which are still to come."""
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
    """Returns the step whose largest micro-batch has whole examples, as many as `tokens` hold."""
    tokens = min(tokens, load.step) if tokens >= load.step else max(1, tokens // load.longest) * load.longest
    labels = tokens if load.labels is None else min(tokens, load.labels)
    return Step(tokens, labels, **how)


def _tokens_that_fit(s: Setting, longest: int, capacity: int, *, recompute: bool) -> int:
    """By the peak of one example, as the trainer's probe has it."""
    one = next(peak.phases(s, Step(longest, longest, recompute=recompute)))
    of_pass = sum(one[name] for name in _PASS)
    rest = sum(size for name, size in one.items() if name not in (*_PASS, "gradients", "gathered"))
    gradients = s.cut(s.gradient_bytes) if s.is_full else s.gradient_bytes
    free = capacity - PROCESS_BYTES[s.device] - rest
    return tokens_in(free, of_pass / longest, gradients + one["gathered"])


def _is_recorded(s: Setting, tokens: int) -> bool:
    """Whether passes become graphs; a method or a RoPE that cannot be recorded is not looked for here."""
    return s.shape.params <= RECORDED_PARAMS and tokens <= RECORDED_TOKENS and not s.shape.experts


def _with_check(s: Setting, step: Step, load: Load, capacity: int) -> Step:
    """The step of a run whose files are compared at the end, where the model is small and there is room for it."""
    room = capacity - PROCESS_BYTES[s.device] - _bytes(peak.at_rest(s)) - s.gradient_bytes
    small = s.shape.params <= peak.MOST_CHECKED and s.ranks == 1
    if not small or room < peak.CHECKED_BYTES * s.shape.params:
        return step
    return replace(step, prompt=min(load.longest, peak.MOST_PROMPT))


def _bytes(parts: Parts) -> int:
    return sum(parts.values())
