"""Estimates how fast a device trains a base, from a past run or from the card's published figures. Pure functions.

A frozen base costs four operations per token and weight, a full fine-tune six, recomputation two more; a
multiplication and an addition count as one each. A step's fixed cost is its kernel launches and the optimizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tunery.planning.cards import Card
from tunery.planning.shape import Shape
from tunery.planning.workload import Workload
from tunery.spec import Full, Lora, Qlora, Technique
from tunery.trainer_protocol import Spent, StepTimes

Basis = Literal["same", "other_technique", "other_base", "estimated"]
"""The basis of a speed: a run here with this base and technique, with this base, with another base, or the table."""

# Shares of the published rate reached by steps of 7,600 tokens on an H200 (bench/results/fp8_job_*, job_speed_*).
MFU, QLORA_MFU = 0.52, 0.51
_FP8_GAIN, _FP8_CARDS = 1.4, frozenset({"H100", "H100 PCIe", "H200", "B200"})
_LAUNCH_SECONDS = 1.0e-3
"""Seconds of kernel launches of a layer, forward and backward, on a GPU."""
_OPTIMIZER_BYTES = 160
"""Bytes read and written per trained weight, derived from the time of an AdamW step on an H200."""
_DECODE_SECONDS = 0.5e-3
"""Seconds of a layer for one more token of a batch of answers."""
_ANSWERS_AT_ONCE = {"cpu": 16, "cuda": 96}
_START_SECONDS = {"cpu": 13.0, "cuda": 24.0}
"""From the claim to the first step: bench/results/service_latency_cpu.json and job_speed_h200.json."""
_READ_BYTES = 1.5e9
_SAVE_SECONDS = 2.0
_SCORE_SECONDS = 1.3
"""Seconds of a scorecard beside its answers, mostly imports and resampling for intervals, on a CPU."""
_DISK_BYTES = 200e6
CPU_OPERATIONS = 40e9
"""fp32 operations per second of two server cores: a guess until the first run here."""


@dataclass(frozen=True)
class Speed:
    """Seconds per unit of a run on one device. `start`, `save`: once; `scores`: of a scorecard beside its answers."""

    basis: Basis
    start: float
    step: float
    token: float
    valid_token: float
    answer_token: float
    general_token: float
    reference_token: float
    scores: float
    checkpoint: float
    save: float
    export: float
    knows_base: bool = False
    job: str | None = None
    model: str | None = None


def operations(shape: Shape, technique: Technique, *, recompute: bool = False) -> float:
    """Returns the operations per trained token, without attention."""
    return (2 * (3 if isinstance(technique, Full) else 2) + 2 * recompute) * _matrices(shape)


def _matrices(shape: Shape) -> float:
    """Returns the weights that a token is multiplied with: all linear layers, its active experts, and the head."""
    dense = shape.params - shape.vocabulary
    passed = shape.linears if shape.experts else max(dense, 1)
    return passed + shape.vocab * shape.hidden


def of_card(card: Card, work: Workload, *, recompute: bool = False) -> Speed:
    """Returns the expected speed of a card, from its published rate and the share of it reached in our benchmarks."""
    rate = card.tflops * 1e12 * _mfu(work.technique, card)
    forward = 2 * _matrices(work.shape) / rate
    layers = work.shape.layers
    return Speed(
        basis="estimated",
        start=_START_SECONDS["cuda"] + 2 * work.shape.params / _READ_BYTES,
        step=layers * _LAUNCH_SECONDS + _OPTIMIZER_BYTES * _learning(work) / (card.bandwidth * 1e9),
        token=operations(work.shape, work.technique, recompute=recompute) / rate,
        valid_token=forward,
        answer_token=forward + _decode(card, work) / min(_ANSWERS_AT_ONCE["cuda"], max(1, work.answers)),
        general_token=forward,
        reference_token=forward,
        scores=_SCORE_SECONDS,
        checkpoint=work.saved_bytes / _DISK_BYTES,
        save=_SAVE_SECONDS + work.saved_bytes / _DISK_BYTES + 6 * work.shape.params / _READ_BYTES,
        export=2 * work.shape.params / _DISK_BYTES,
    )


def _mfu(technique: Technique, card: Card) -> float:
    if isinstance(technique, Qlora):
        return QLORA_MFU
    is_fp8 = isinstance(technique, Lora) and technique.precision == "fp8" and card.name in _FP8_CARDS
    return MFU * (_FP8_GAIN if is_fp8 else 1)


def _decode(card: Card, work: Workload) -> float:
    """Returns the seconds for one more token of a batch of answers: the longer of reading weights and launches."""
    return max(work.shape.layers * _DECODE_SECONDS, 2 * work.shape.params / (card.bandwidth * 1e9))


def _learning(work: Workload) -> float:
    return work.saved_bytes / (2 if isinstance(work.technique, Full) else 4)


def of_cpu(work: Workload) -> Speed:
    """Returns a guess for a host without a GPU and without past runs."""
    forward = 2 * _matrices(work.shape) / CPU_OPERATIONS
    return Speed(
        basis="estimated",
        start=_START_SECONDS["cpu"],
        step=0.02,
        token=operations(work.shape, work.technique) / CPU_OPERATIONS,
        valid_token=forward,
        answer_token=forward,
        general_token=forward,
        reference_token=forward,
        scores=_SCORE_SECONDS,
        checkpoint=work.saved_bytes / _DISK_BYTES,
        save=_SAVE_SECONDS + work.saved_bytes / _DISK_BYTES,
        export=2 * work.shape.params / _DISK_BYTES,
    )


@dataclass(frozen=True)
class Record:
    """A past run on a kind of device, with the seconds of its parts.

    `job`: its id, if it may be shown. `around`: seconds from claim to end outside the trainer: preparing files,
    imports, the upload.
    """

    job: str | None
    model: str
    device: str
    work: Workload
    around: float
    trainer_seconds: float
    spent: Mapping[str, Spent]
    step_times: StepTimes | None


def of_record(record: Record) -> Speed:
    """Returns the speed of a past run. Parts that it lacked are estimated from its steps."""
    work, spent = record.work, record.spent
    step, token = fit(record.step_times, spent.get("step"), work)
    seconds = {name: part.seconds for name, part in spent.items()}
    forward = token / (operations(work.shape, work.technique) / (2 * _matrices(work.shape)))
    warm_up = max(0.0, seconds.get("step", 0) - work.steps * step - work.tokens * token)
    scores = seconds.get("scores", _SCORE_SECONDS)
    unseen = 0.0 if "scores" in seconds or not work.scored else scores  # not measured by earlier releases
    saved = max(0.0, record.trainer_seconds - sum(seconds.values()) - unseen)
    return Speed(
        basis="same",
        start=record.around + seconds.get("prepare", 0) + warm_up,
        step=step,
        token=token,
        valid_token=_unit(spent, "validation", forward),
        answer_token=_unit(spent, "answer", forward * work.answer_tokens) / work.answer_tokens,
        general_token=_unit(spent, "general", forward),
        reference_token=_unit(spent, "reference", forward),
        scores=scores,
        checkpoint=_unit(spent, "checkpoint", work.saved_bytes / _DISK_BYTES),
        save=saved,
        export=seconds.get("exports", 2 * work.shape.params / _DISK_BYTES),
        knows_base=True,
        job=record.job,
        model=record.model,
    )


def _unit(spent: Mapping[str, Spent], part: str, otherwise: float) -> float:
    found = spent.get(part)
    return found.seconds / found.units if found is not None and found.units else otherwise


def fit(times: StepTimes | None, every: Spent | None, work: Workload) -> tuple[float, float]:
    """Returns the fixed seconds of a step and those of each token, from a line fitted to a run's steps; both are >= 0.

    Steps of similar length cannot separate the two: then all time is attributed to the tokens.
    """
    if times is None or not times.steps or not times.tokens:
        return 0.0, (every.seconds if every else 0.0) / max(1.0, work.tokens)
    n = times.steps
    mean_tokens, mean_seconds = times.tokens / n, times.seconds / n
    spread = times.tokens_squared / n - mean_tokens**2
    per_token = mean_seconds / mean_tokens
    if n < _LEAST_STEPS or spread < (_LEAST_SPREAD * mean_tokens) ** 2:
        return 0.0, per_token
    slope = (times.seconds_tokens / n - mean_tokens * mean_seconds) / spread
    slope = min(max(slope, 0.0), per_token)
    return mean_seconds - slope * mean_tokens, slope


_LEAST_STEPS, _LEAST_SPREAD = 8, 0.1


def scaled(speed: Speed, record: Workload, work: Workload) -> Speed:
    """Returns the speed scaled to another base or technique, by operations, layers and bytes."""
    same_base = record.shape == work.shape
    if same_base and record.technique.type == work.technique.type:
        return speed
    trained = operations(work.shape, work.technique) / operations(record.shape, record.technique)
    forward = _matrices(work.shape) / _matrices(record.shape)
    bytes_ratio = max(1, work.saved_bytes) / max(1, record.saved_bytes)
    return replace(
        speed,
        basis="other_technique" if same_base else "other_base",
        start=max(1.0, speed.start + 2 * (work.shape.params - record.shape.params) / _READ_BYTES),
        step=speed.step * work.shape.layers / max(1, record.shape.layers),
        token=speed.token * trained,
        valid_token=speed.valid_token * forward,
        answer_token=speed.answer_token * forward,
        general_token=speed.general_token * forward,
        reference_token=speed.reference_token * forward,
        checkpoint=speed.checkpoint * bytes_ratio,
        save=speed.save * max(1.0, bytes_ratio),
        export=speed.export * forward,
        knows_base=same_base and speed.knows_base,
    )


def choose(records: list[Record], work: Workload, *, most: int = 5) -> list[Record]:
    """Returns the most similar runs: same base and technique, else same base, else nearest in parameters.

    Records are of one kind of device, newest first. Among equally similar ones the newest are taken.
    """
    for test in (_is_same, lambda record, wanted: record.work.shape == wanted.shape):
        if alike := [record for record in records if test(record, work)]:
            return alike[:most]
    nearest = min((_distance(record, work) for record in records), default=None)
    return [record for record in records if _distance(record, work) == nearest][:most]


def _is_same(record: Record, work: Workload) -> bool:
    return record.work.shape == work.shape and record.work.technique.type == work.technique.type


def _distance(record: Record, work: Workload) -> float:
    """Returns the ratio of the larger base's size to the smaller one's."""
    sizes = sorted((max(1, record.work.shape.params), max(1, work.shape.params)))
    return sizes[1] / sizes[0]
