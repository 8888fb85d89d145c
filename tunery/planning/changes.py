"""Checks whether a run fits a device, and says what to change if not, the cheapest change first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from tunery.failures import DoesNotFit
from tunery.planning import expected, memory, peak
from tunery.planning.peak import Estimate, Setting
from tunery.planning.precision import decide
from tunery.spec import Full, Lora, Qlora, Resources, Technique

GPU_COUNTS: tuple[int, ...] = get_args(Resources.model_fields["gpus"].annotation)
"""Numbers of GPUs that a job may request."""
_SHORTEST = 256
_FORCE = "Set resources.force to true to try anyway."


@dataclass(frozen=True)
class Change:
    """A change in words, and the minimum memory per device that the run then needs."""

    text: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.text}, which needs about {memory.gib(self.bytes)}"


def check(
    model_info: Mapping[str, Any],
    technique: Technique,
    *,
    max_seq_length: int,
    capacity: int,
    longest: int | None = None,
    device: str = "cuda",
    model: str = "the model",
    gpus: int = 1,
    **of_run: Any,
) -> Estimate:
    """Returns the run's minimum memory, if `capacity` bytes are enough. Raises DoesNotFit, which says what to change.

    `longest`: tokens of the longest row, if the rows were read; else all may have max_seq_length tokens.
    `gpus`: the number of GPUs of that capacity in one host, over which the model could be sharded.
    """
    asked: dict[str, Any] = {"device": device, "rows": 1, "optimizer": "adamw", "ranks": 1, **of_run}
    length = max_seq_length if longest is None else min(longest, max_seq_length)
    need = memory.estimate(model_info, technique, max_seq_length=length, **asked)
    if need.bytes > capacity:
        ranks, rows = asked["ranks"], "rows" if asked["rows"] == 1 else "pairs of rows"
        weights = peak.at_rest(Setting.of(model_info, technique, device, asked["optimizer"], ranks))["base"]
        raise DoesNotFit(
            param="technique",
            what=f"A {technique.type} fine-tune of {model} ({memory.gib(weights)} of weights"
            f"{f' on each of {ranks} GPUs' if ranks > 1 else ''}), {rows} of {length} tokens,",
            needed=f"about {memory.gib(need.bytes)}",
            device="GPU" if device == "cuda" else "host",
            capacity=memory.gib(capacity),
            instead=f"{advise(model_info, technique, capacity, gpus=gpus, max_seq_length=length, **asked)} {_FORCE}",
        )
    return need


def advise(model_info: Mapping[str, Any], technique: Technique, capacity: int, *, gpus: int, **of_run: Any) -> str:
    """Returns what to change: more of the host's `gpus`, a lighter technique, shorter rows, another base or worker.

    Suggests only changes with which the trainer finds a plan. `of_run`: as in `memory.estimate`.
    """
    lighter = find_lighter(model_info, technique, capacity, of_run)
    more = _more_gpus(model_info, technique, capacity, gpus, of_run)
    if more is not None:
        return f"{more} on each.{f' Or use {lighter}.' if lighter else ''}"
    if lighter is not None:
        return f"Use {lighter}."
    shorter = find_shorter(model_info, technique, capacity, of_run)
    if shorter is not None:
        return f"Lower max_seq_length to {shorter}."
    return (
        f"Use a smaller base model, or a worker with {'a larger GPU' if of_run['device'] == 'cuda' else 'more memory'}."
    )


def _more_gpus(
    model_info: Mapping[str, Any], technique: Technique, capacity: int, gpus: int, of_run: Mapping[str, Any]
) -> Change | None:
    """Returns the change to the fewest GPUs that hold the sharded model."""
    if not expected.can_shard(technique):
        return None
    for ranks in (count for count in GPU_COUNTS if of_run["ranks"] < count <= gpus and of_run["device"] == "cuda"):
        cut = {**of_run, "ranks": ranks}
        if expected.runs(model_info, technique, capacity=capacity, **cut):
            text = f"Set resources.gpus to {ranks} and resources.sharding to 'auto'"
            return Change(text, memory.estimate(model_info, technique, **cut).bytes)
    return None


def find_lighter(
    model_info: Mapping[str, Any], technique: Technique, capacity: int, of_run: Mapping[str, Any]
) -> Change | None:
    """Returns the change to the most similar technique for which the trainer finds a plan."""
    refused = {name for name, reason in (model_info.get("techniques") or {}).items() if reason}
    for other, text in _lighter(technique, of_run["device"]):
        if other.type not in refused and expected.runs(model_info, other, capacity=capacity, **of_run):
            return Change(text, memory.estimate(model_info, other, **of_run).bytes)
    return None


def _lighter(technique: Technique, device: str) -> Iterator[tuple[Technique, str]]:
    """Yields techniques that need less memory, with their names in words, the most similar first."""
    if isinstance(technique, Full):
        if decide(technique, device) != decide(Full(), device):
            yield Full(), "technique.weights_dtype 'bfloat16'"
        yield Lora(), "the technique 'lora'"
    if not isinstance(technique, Qlora):
        yield Qlora(), "the technique 'qlora'"


def find_shorter(
    model_info: Mapping[str, Any], technique: Technique, capacity: int, of_run: Mapping[str, Any]
) -> int | None:
    """Returns the change to the longest half, quarter, ... of max_seq_length for which the trainer finds a plan."""
    shorter = of_run["max_seq_length"] // 2
    while shorter >= _SHORTEST:
        if expected.runs(model_info, technique, capacity=capacity, **{**of_run, "max_seq_length": shorter}):
            return int(shorter)
        shorter //= 2
    return None
