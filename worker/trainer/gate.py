"""Judges from the scorecard's intervals whether a tuned model meets its job's limits."""

from typing import NamedTuple

from tunery.spec import Gate
from tunery.trainer_protocol import GateCheck, Gated, Score, Verdict


class Measured(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def judge(gate: Gate, score: Score | None) -> Gated:
    """Returns the verdict: failed if one check fails, else inconclusive if one is; one without a measurement is."""
    limits = {
        "min_task_gain": (gate.min_task_gain, _task_gain(score)),
        "max_general_drop": (gate.max_general_drop, _general_drop(score)),
        "max_kl": (gate.max_kl, _kl(score)),
    }
    checks = [_check(name, limit, found) for name, (limit, found) in limits.items() if limit is not None]
    found = {check.status for check in checks}
    status: Verdict = "failed" if "failed" in found else "inconclusive" if "inconclusive" in found else "passed"
    withheld = status == "failed" or (status == "inconclusive" and gate.on_inconclusive == "withhold")
    return Gated(status=status, withheld=withheld, checks=checks)


def _check(name: str, limit: float, found: Measured | None) -> GateCheck:
    if found is None:
        return GateCheck(name=name, limit=limit, value=None, low=None, high=None, status="inconclusive")
    passed, failed = found.high <= limit, found.low > limit
    if name.startswith("min"):
        passed, failed = found.low >= limit, found.high < limit
    status: Verdict = "passed" if passed else "failed" if failed else "inconclusive"
    return GateCheck(name=name, limit=limit, **found._asdict(), status=status)


def _task_gain(score: Score | None) -> Measured | None:
    if score is None:
        return None
    primary = score.metrics.get(score.primary)
    if primary is None:
        return Measured(score.gain, score.gain_low, score.gain_high)
    return Measured(primary.gain, primary.low, primary.high)


def _general_drop(score: Score | None) -> Measured | None:
    """Returns the drop: the change with its sign, and so the ends of its interval, swapped."""
    if score is None or score.general is None:
        return None
    return Measured(-score.general.change, -score.general.change_high, -score.general.change_low)


def _kl(score: Score | None) -> Measured | None:
    if score is None or score.general is None or score.general.forgetting is None:
        return None
    moved = score.general.forgetting
    return Measured(moved.kl, moved.kl_low, moved.kl_high)
