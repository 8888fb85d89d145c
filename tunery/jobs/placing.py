"""Places a run on the known devices: makes its plan and computes the memory that it needs. Reads no rows."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tunery.jobs import waiting
from tunery.jobs.model import HostDevice
from tunery.planning import advice, changes, expected, memory, peak
from tunery.planning.fitting import StepPlan
from tunery.spec import Plan, TrainingSpec

ANY_ROW = 64
"""Assumed tokens of the longest row before rows are counted: few, so that only impossible runs are refused."""


def find_gpus(devices: Sequence[HostDevice]) -> list[HostDevice]:
    """Returns the devices that are GPUs."""
    return [device for device in devices if device.gpu_index is not None]


def make_plan(
    spec: TrainingSpec,
    model_info: Mapping[str, Any],
    devices: Sequence[HostDevice],
    *,
    examples: int,
    longest_answer: int | None,
    model: str,
    longest: int | None = None,
) -> Plan:
    """Returns the plan of a run on `examples` rows. `longest_answer`: tokens of the longest reference answer; `model`:
    its name in the request; `longest`: tokens of the longest row, None if not counted.

    Raises DoesNotFit where the largest known device is too small; never before a worker has offered a device, nor for
    a forced job.
    """
    known: dict[str, Any] = {"examples": examples, "model_info": model_info, "longest_answer": longest_answer}
    largest = _largest(devices)
    if largest is None:
        return advice.resolve(spec, **known, bf16_fits=True)
    length = min(advice.max_length(spec, model_info), longest or sys.maxsize)
    limits = _limits(largest, length, spec.method.rows_an_example, spec.optimizer)
    fits = expected.bf16_runs(model_info, **limits)
    plan = _shared_out(advice.resolve(spec, **known, bf16_fits=fits), model_info, limits)
    if not spec.resources.force:
        of_run = {**limits, "ranks": _ranks(plan), "longest": longest or ANY_ROW}
        changes.check(model_info, plan.technique, **of_run, model=model, gpus=_alike(devices, largest))
    return plan


def _alike(devices: Sequence[HostDevice], largest: HostDevice) -> int:
    """Returns the most GPUs of one host that have as much memory as the largest."""
    hosts = Counter(each.host for each in find_gpus(devices) if each.memory_bytes >= largest.memory_bytes)
    return max(hosts.values(), default=0)


def bf16_fits(model_info: Mapping[str, Any], devices: Sequence[HostDevice]) -> bool | None:
    """Whether the largest device can train the base in bf16 with rows of the default length; None without a device."""
    largest, spec = _largest(devices), TrainingSpec(seed=0)
    if largest is None:
        return None
    return expected.bf16_runs(model_info, **_limits(largest, advice.max_length(spec, model_info), 1, spec.optimizer))


def need(plan: Plan, model_info: Mapping[str, Any], device: str, *, longest: int | None = None) -> peak.Estimate:
    """Returns the minimum memory of the run on each device of a kind, `cuda` or `cpu`. `longest`: as in `make_plan`."""
    asked: dict[str, Any] = {"rows": plan.method.rows_an_example, "optimizer": plan.optimizer}
    asked["max_seq_length"] = min(plan.max_seq_length, longest or sys.maxsize)
    asked["ranks"] = _ranks(plan) if device == "cuda" else 1
    return memory.estimate(model_info, plan.technique, **asked, device=device)


def wanted_bytes(plan: Plan, size: int, devices: Sequence[HostDevice], *, on_gpu: bool) -> int:
    """Returns the memory that a claim must offer on a kind of device; for a forced job at most the largest device's."""
    sizes = [device.memory_bytes for device in devices if (device.gpu_index is not None) == on_gpu]
    return min(size, max(sizes, default=size)) if plan.resources.force else size


def step_here(
    plan: Plan, model_info: Mapping[str, Any], devices: Sequence[HostDevice], *, longest: int | None = None
) -> StepPlan | None:
    """Returns how the trainer would run a step on the largest GPU here; None without a GPU, or if only its probe can
    decide. `longest`: as in `make_plan`.
    """
    gpus = find_gpus(devices)
    if not gpus:
        return None
    found = expected.run(
        model_info,
        plan.technique,
        max_seq_length=min(plan.max_seq_length, longest or sys.maxsize),
        capacity=max(device.memory_bytes for device in gpus),
        rows=plan.method.rows_an_example,
        optimizer=plan.optimizer,
        ranks=_ranks(plan),
        batch=-(-plan.batch_size // plan.resources.gpus),
    )
    return None if found is None else StepPlan.of(found)


def border_warnings(
    plan: Plan, model_info: Mapping[str, Any], devices: Sequence[HostDevice], *, longest: int | None = None
) -> list[str]:
    """Warns of a run that is accepted although no plan is found for it on the largest GPU here."""
    if not find_gpus(devices) or step_here(plan, model_info, devices, longest=longest) is not None:
        return []
    length = min(plan.max_seq_length, longest or sys.maxsize)
    size = memory.gib(max(device.memory_bytes for device in find_gpus(devices)))
    return [
        f"Rows of {length} tokens may not fit on the largest GPU here, which has {size}. The trainer measures this "
        "before the first step and fails the job if they do not fit. Lower max_seq_length, or use a technique that "
        "needs less memory."
    ]


def warnings(devices: Sequence[HostDevice], *, gpus: int, gpu_bytes: int, cpu_bytes: int) -> list[str]:
    """Warns of a run that no host here can take, which therefore waits. `cpu_bytes`: needed on a host without a GPU;
    ignored where there is a GPU."""
    if not devices:
        needs = f"a GPU with {memory.gib(gpu_bytes)} of memory, or a host with {memory.gib(cpu_bytes)}"
        return [f"No training worker has connected yet: the job waits for one with {needs}."]
    of_host = None if find_gpus(devices) else cpu_bytes
    missing = waiting.lack(devices, gpus=gpus, gpu_bytes=gpu_bytes, cpu_bytes=of_host)
    return [] if missing is None else [f"No host here can take the job. It waits for {missing}."]


def _largest(devices: Sequence[HostDevice]) -> HostDevice | None:
    # GPUs before host memory: where there is a GPU, a job must not be planned for a CPU, on which it takes weeks.
    return max(find_gpus(devices) or devices, key=lambda device: device.memory_bytes, default=None)


def _limits(largest: HostDevice, length: int, rows: int, optimizer: str) -> dict[str, Any]:
    return {
        "max_seq_length": length,
        "rows": rows,
        "capacity": largest.memory_bytes,
        "device": "cpu" if largest.gpu_index is None else "cuda",
        "optimizer": optimizer,
    }


def _shared_out(plan: Plan, model_info: Mapping[str, Any], limits: Mapping[str, Any]) -> Plan:
    """Returns the plan with its sharding over several GPUs decided."""
    resources = plan.resources
    if resources.gpus == 1:
        return plan
    chosen = expected.choose_sharding(
        model_info, plan.technique, gpus=resources.gpus, asked=resources.sharding, **limits
    )
    return plan.model_copy(update={"resources": resources.model_copy(update={"sharding": chosen})})


def _ranks(plan: Plan) -> int:
    """Returns over how many GPUs the plan shards the model."""
    return plan.resources.gpus if plan.resources.sharding == "full_shard" else 1
