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

Basis = Literal["same", "other_method", "other_technique", "other_base", "estimated"]
"""The basis of a speed: a run here with this base, technique and method, with this base and technique, with this base,
with another base, or the table."""

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
_ROW_TOKEN = 1.5e-6
"""Seconds to read and tokenise a token of the files' rows: cautious, for busy hosts and templates that are run for each
row. On two idle cores plain rows take a fifth of it: bench/results/prepare_cpu.json."""
CPU_OPERATIONS = 40e9
"""fp32 operations per second of two server cores: a guess until the first run here."""


@dataclass(frozen=True)
class Speed:
    """Seconds per unit of a run on one device. `start`, `save`: once; `scores`: of a scorecard beside its answers."""

    basis: Basis
    start: float
    row_token: float
    step: float
    token: float
    valid_token: float
    answer_token: float
    replay_token: float
    general_token: float
    pair_token: float
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
    return max(shape.active - shape.vocabulary, 1) + shape.vocab * shape.hidden


def _forward(work: Workload) -> float:
    """Returns the operations of a token's forward pass."""
    return 2 * _matrices(work.shape)


def of_card(card: Card, work: Workload, *, recompute: bool = False) -> Speed:
    """Returns the expected speed of a card, from its published rate and the share of it reached in our benchmarks."""
    rate = card.tflops * 1e12 * _mfu(work.technique, card)
    answer = _decode(card, work) / min(_ANSWERS_AT_ONCE["cuda"], max(1, work.answers + work.replay_answers))
    made = _estimated(work, _forward(work) / rate, operations(work.shape, work.technique, recompute=recompute) / rate)
    return replace(
        made,
        start=_START_SECONDS["cuda"] + 2 * work.shape.params / _READ_BYTES,
        step=work.shape.layers * _LAUNCH_SECONDS + _OPTIMIZER_BYTES * _learning(work) / (card.bandwidth * 1e9),
        answer_token=made.answer_token + answer,
        replay_token=made.replay_token + answer,
        save=made.save + 6 * work.shape.params / _READ_BYTES,
    )


def of_cpu(work: Workload) -> Speed:
    """Returns a guess for a host without a GPU and without past runs."""
    token = operations(work.shape, work.technique) / CPU_OPERATIONS
    return _estimated(work, _forward(work) / CPU_OPERATIONS, token)


def _estimated(work: Workload, forward: float, token: float) -> Speed:
    """Returns a CPU's speed with so many seconds for a token's forward pass, and for a trained token."""
    return Speed(
        basis="estimated",
        start=_START_SECONDS["cpu"],
        row_token=_ROW_TOKEN,
        step=0.02,
        token=token,
        valid_token=forward,
        answer_token=forward,
        replay_token=forward,
        general_token=forward,
        pair_token=forward,
        reference_token=forward,
        scores=_SCORE_SECONDS,
        checkpoint=work.saved_bytes / _DISK_BYTES,
        save=_SAVE_SECONDS + work.saved_bytes / _DISK_BYTES,
        export=_export(work),
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
    forward = token / (operations(work.shape, work.technique) / _forward(work))
    warm_up = max(0.0, seconds.get("step", 0) - work.steps * step - work.tokens * token)
    answer = _unit(spent, "answer", forward * work.answer_tokens) / work.answer_tokens
    return replace(
        _estimated(work, forward, token),
        basis="same",
        start=record.around + seconds.get("prepare", 0) + warm_up,
        row_token=_unit(spent, "rows", _ROW_TOKEN) if "rows" in spent else 0.0,  # earlier releases: in `prepare`
        step=step,
        valid_token=_unit(spent, "validation", forward),
        answer_token=answer,
        replay_token=_unit(spent, "replay", answer * work.replay_answer_tokens) / work.replay_answer_tokens,
        general_token=_unit(spent, "general", forward),
        pair_token=_unit(spent, "pairs", forward),
        reference_token=_unit(spent, "reference", forward),
        scores=seconds.get("scores", _SCORE_SECONDS),
        checkpoint=_unit(spent, "checkpoint", work.saved_bytes / _DISK_BYTES),
        save=_saved(record),
        export=seconds["exports"] / work.exports if work.exports and "exports" in seconds else _export(work),
        knows_base=True,
        job=record.job,
        model=record.model,
    )


def _saved(record: Record) -> float:
    """Returns the seconds of a run that nothing else took. Scores and exports were not measured by earlier releases."""
    seconds = {name: part.seconds for name, part in record.spent.items()}
    if record.work.scored:
        seconds.setdefault("scores", _SCORE_SECONDS)
    rest = record.trainer_seconds - sum(seconds.values())
    return max(0.0, rest if "exports" in seconds else rest - _export(record.work) * record.work.exports)


def _export(work: Workload) -> float:
    """Returns the seconds to read or write a whole model."""
    return 2 * work.shape.params / _DISK_BYTES


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


def scaled(speed: Speed, record: Workload, work: Workload, device: str = "CPU") -> Speed:
    """Returns the speed scaled to another base, technique or method.

    A trained token is scaled by its operations and by what its technique takes beside them, another token by those of
    a forward pass, a step by the layers, files by their bytes. A method changes none: a token of a pair is trained like
    any other, and its reference is measured on its own.
    """
    basis = _basis(record, work)
    if basis in ("same", "other_method"):
        return replace(speed, basis=basis)
    trained = _token_cost(work, device) / _token_cost(record, device)
    forward = _matrices(work.shape) / _matrices(record.shape)
    passed = {name: getattr(speed, name) * forward for name in _FORWARD}
    bytes_ratio = max(1, work.saved_bytes) / max(1, record.saved_bytes)
    read = 2 * (work.shape.params - record.shape.params) / _READ_BYTES
    uploaded = (work.saved_bytes - record.saved_bytes) / _DISK_BYTES
    return replace(
        speed,
        basis=basis,
        start=max(1.0, speed.start + read + uploaded),
        step=speed.step * work.shape.layers / max(1, record.shape.layers),
        token=speed.token * trained,
        **passed,
        checkpoint=speed.checkpoint * bytes_ratio,
        save=speed.save * max(1.0, bytes_ratio),
        export=speed.export * forward,
        knows_base=basis == "other_technique" and speed.knows_base,
    )


_COSTS = {
    "cpu": {"qlora": 1.1, "dora": 1.4},
    "cuda": {"qlora": MFU / QLORA_MFU, "fp8": 1 / _FP8_GAIN, "dora": 1.4},
}
"""What an operation of a technique takes, relative to LoRA and to a full fine-tune: on a CPU by
bench/results/technique_costs_cpu.json; DoRA's on a GPU is assumed to be the same."""
_FORWARD = ("valid_token", "answer_token", "replay_token", "general_token", "pair_token", "reference_token")


def _token_cost(work: Workload, device: str) -> float:
    """Returns what a trained token takes, relative to other techniques and bases."""
    costs = _COSTS["cpu" if device == "CPU" else "cuda"]
    return operations(work.shape, work.technique) * costs.get(_kind(work.technique), 1.0)


def _kind(technique: Technique) -> str:
    """Returns what tells the speeds of techniques apart: the type, and products or norms of its own."""
    if isinstance(technique, Full):
        return "full"
    return "dora" if technique.use_dora else "fp8" if technique.precision == "fp8" else technique.type


def _basis(record: Workload, work: Workload) -> Basis:
    """Returns how a run is like another one."""
    if record.shape != work.shape:
        return "other_base"
    if _kind(record.technique) != _kind(work.technique):
        return "other_technique"
    return "same" if record.method == work.method else "other_method"


def choose(records: list[Record], work: Workload, *, most: int = 5) -> list[Record]:
    """Returns the most similar runs: same base, technique and method, else same base and technique, else same base,
    else nearest in parameters, if that is at most _FARTHEST times larger or smaller.

    Records are of one kind of device, newest first. Among equally similar ones the newest are taken.
    """
    found = [(_basis(record.work, work), record) for record in records]
    for basis in ("same", "other_method", "other_technique"):
        if alike := [record for of, record in found if of == basis]:
            return alike[:most]
    nearest = min((_distance(record, work) for record in records), default=_FARTHEST)
    return [record for record in records if _distance(record, work) == nearest <= _FARTHEST][:most]


_FARTHEST = 100.0
"""In the time of a far smaller base, what does not grow with the weights prevails: scaled by them, it is nonsense."""


def _distance(record: Record, work: Workload) -> float:
    """Returns the ratio of the larger base's size to the smaller one's."""
    sizes = sorted((max(1, record.work.shape.params), max(1, work.shape.params)))
    return sizes[1] / sizes[0]
