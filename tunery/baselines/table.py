"""The table of a baseline: the scores of each way to prompt a model, and of tuned models on the same rows."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from tunery.baselines.model import Baseline
from tunery.baselines.order import Order, Price
from tunery.datasets.model import File
from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.models.model import Model
from tunery.planning.intervals import wilson
from tunery.planning.prices import Prices, cost
from tunery.planning.prompting import BINARY_METRICS, Figure, PromptScore

Way = Literal["zero_shot", "few_shot", "nearest", "tuned"]
Verdict = Literal["met", "unsure", "missed"]
EXTERNAL = "external"
_MOST_TUNES = 20


class Row(BaseModel):
    """One thing that answers the eval rows. `met`: its interval lies above the target; `unsure`: the interval holds the
    target, and the score reaches it."""

    model_config = ConfigDict(frozen=True)

    way: Way
    model: str
    place: Literal["here", "external"] = Field("here", description="Where the model answers")
    job: str | None = Field(None, description="The job whose scorecard was read; null: measured by the baseline")
    shots: int
    rows: int
    metric: str | None = Field(description="Metric of the score: the target's, or the task's primary metric")
    score: float | None
    low: float | None = Field(description="Lower end of the score's 95 % interval")
    high: float | None
    metrics: dict[str, Figure]
    prompt_tokens: float | None = Field(description="Mean per request")
    answer_tokens: float | None = Field(description="Mean per answer")
    cost_per_1000: float | None = Field(
        description="Cost of a thousand answers, in the currency of the server's prices"
    )
    p50_seconds: float | None = Field(description="Median time of a single request")
    device: str | None = Field(
        None, description="Device that answered, if the model ran here; times of different devices are not comparable"
    )
    verdict: Verdict | None = Field(None, description="Verdict by the target; null without one")
    error: str | None = None


def rows(session: Session, baseline: Baseline, prices: Prices) -> list[Row]:
    """Returns the table: the baseline's own rows, then the tunes on the same eval rows, newest first."""
    order = Order.model_validate(baseline.order)
    measured = list(_measured(baseline, order, prices))
    zero = next((row for row in measured if row.way == "zero_shot" and row.model == baseline.model), None)
    return measured + list(_tunes(session, baseline, order, zero, prices))


def cheapest(found: list[Row]) -> Row | None:
    """Returns the cheapest row that meets the target; if none certainly does, the cheapest that may."""
    for wanted in ("met", "unsure"):
        if reached := [row for row in found if row.verdict == wanted]:
            return min(reached, key=_price)
    return None


def _price(row: Row) -> tuple[bool, float, bool, float]:
    """Returns the sort key: known costs first; at equal cost rows without training, then shorter prompts."""
    cost = row.cost_per_1000
    return cost is None, cost or 0.0, row.job is not None, row.prompt_tokens or 0.0


def _measured(baseline: Baseline, order: Order, prices: Prices) -> Iterator[Row]:
    for measured in (baseline.result or {}).get("models", ()):
        asked = order.external if measured["place"] == EXTERNAL else None
        for found in measured["scores"]:
            score = PromptScore.model_validate(found)
            row = _row(order, score.metrics, score.primary)
            yield Row(
                way=_way(measured, score),
                model=measured["model"],
                place=measured["place"],
                shots=score.shots,
                rows=score.rows,
                prompt_tokens=score.prompt_tokens,
                answer_tokens=score.answer_tokens,
                cost_per_1000=_cost_here(score, prices)
                if asked is None
                else _cost_there(score, asked.price_per_million),
                p50_seconds=score.p50_seconds,
                device=score.device,
                error=score.error,
                **row,
            )


def _way(measured: Mapping[str, Any], score: PromptScore) -> Way:
    if measured["tuned"]:
        return "tuned"
    return "zero_shot" if not score.shots else "nearest" if score.nearest else "few_shot"


def _cost_here(score: PromptScore, prices: Prices) -> float | None:
    """Returns the device's cost of a thousand sequential requests, each in the median time."""
    if score.p50_seconds is None or score.device is None:
        return None
    return cost(1000 * score.p50_seconds, score.device, prices)


def _cost_there(score: PromptScore, price: Price | None) -> float | None:
    if price is None or score.prompt_tokens is None or score.answer_tokens is None:
        return None
    return (score.prompt_tokens * price.prompt + score.answer_tokens * price.answer) / 1000


def _row(order: Order, metrics: Mapping[str, Figure], primary: str | None) -> dict[str, Any]:
    """Returns the fields of a row that its metrics decide."""
    name = order.target.metric if order.target is not None and order.target.metric is not None else primary
    found = metrics.get(name or "")
    score, low, high = (found.score, found.low, found.high) if found else (None, None, None)
    verdict = None if order.target is None else _verdict(order.target.at_least, score, low)
    return {"metric": name, "score": score, "low": low, "high": high, "metrics": dict(metrics), "verdict": verdict}


def _verdict(at_least: float, score: float | None, low: float | None) -> Verdict | None:
    if score is None:
        return None
    if low is not None and low >= at_least:
        return "met"
    return "unsure" if score >= at_least else "missed"


def _tunes(session: Session, baseline: Baseline, order: Order, zero: Row | None, prices: Prices) -> Iterator[Row]:
    """Yields rows of the base's tuned models with a scorecard on the same eval rows."""
    if zero is None:
        return
    for job, model in _jobs(session, baseline):
        card = job.scorecard or {}
        if card["rows"] != zero.rows or model.id in (baseline.order.get("compare") or ()):
            continue  # it answered other rows, or was measured here
        metrics = {name: _tuned_figure(name, found, card["rows"]) for name, found in card["metrics"].items()}
        yield Row(
            way="tuned",
            model=model.id,
            job=job.id,
            shots=0,
            rows=card["rows"],
            **_timed(job.progress.get("latency"), zero, prices),
            **_row(order, metrics, card["primary"]),
        )


def _timed(latency: Mapping[str, Any] | None, zero: Row, prices: Prices) -> dict[str, Any]:
    """Returns the fields of a tune's row that its job timed; jobs of earlier releases timed nothing."""
    if latency is None:  # the tuned model is asked in its base's template
        return {"prompt_tokens": zero.prompt_tokens, "answer_tokens": None, "cost_per_1000": None, "p50_seconds": None}
    return {
        "prompt_tokens": latency["prompt_tokens"],
        "answer_tokens": latency["answer_tokens"],
        "p50_seconds": latency["p50_seconds"],
        "cost_per_1000": cost(1000 * latency["p50_seconds"], latency["device"], prices),
        "device": latency["device"],
    }


def _jobs(session: Session, baseline: Baseline) -> list[tuple[Job, Model]]:
    same, own = aliased(File), select(File.sha256).where(File.id == baseline.eval_file).scalar_subquery()
    query = (
        select(Job, Model)
        .join(Model, Model.id == Job.tuned_model)
        .join(same, same.id == Job.test_file)
        .where(Job.project_id == baseline.project_id, Job.state == State.SUCCEEDED, same.sha256 == own)
        .where(Job.base_model == baseline.model, Job.scorecard.is_not(None))
        .where(Model.deleted_at.is_(None), ~Model.withheld)
        .order_by(Job.created_at.desc())
        .limit(_MOST_TUNES)
    )
    return [(row.Job, row.Model) for row in session.execute(query)]


def _tuned_figure(name: str, found: Mapping[str, Any], n: int) -> Figure:
    """Returns a figure of a tuned model. A scorecard has only the gain's interval; a share's follows from its rows."""
    score = found["tuned"]
    low, high = wilson(round(score * n), n) if name in BINARY_METRICS else (None, None)
    return Figure(score=score, low=low, high=high)
