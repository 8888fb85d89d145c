"""Baselines, as the API spells them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, SecretStr

from api.schemas.base import Body, ResponseBody, maybe_seconds, seconds
from tunery.baselines import table
from tunery.baselines.model import Baseline as Stored
from tunery.baselines.order import BaselineOptions, External, Order, Target
from tunery.baselines.table import Row
from tunery.planning.prompting import Retrieval
from tunery.spec import Columns

ASKED: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct",
    "eval_file": "file-abc123",
    "examples_file": "file-def456",
    "shots": "auto",
    "retrieval": "nearest",
    "target": {"metric": "exact", "at_least": 0.9},
}
ROW: dict[str, Any] = {
    "way": "nearest",
    "model": "SmolLM2-135M-Instruct",
    "place": "here",
    "job": None,
    "shots": 8,
    "rows": 200,
    "metric": "exact",
    "score": 0.61,
    "low": 0.54,
    "high": 0.68,
    "metrics": {"exact": {"score": 0.61, "low": 0.54, "high": 0.68}},
    "prompt_tokens": 402.5,
    "answer_tokens": 8.0,
    "cost_per_1000": None,
    "p50_seconds": 0.41,
    "verdict": "missed",
    "error": None,
}


class AskExternal(External):
    """An external endpoint and the key for it, which is kept encrypted until the baseline ends."""

    api_key: SecretStr | None = Field(None, description="Sent as a bearer token")


class AskBaseline(BaselineOptions, Body):
    """A model, an eval file, and how the model is to be prompted."""

    model_config = ConfigDict(json_schema_extra={"examples": [ASKED]})

    model: str = Field(min_length=1, description="The base that may be fine-tuned: its id, alias or hub id")
    eval_file: str = Field(
        min_length=1, description="Rows with the expected answers, as in a job's evaluation.test_file"
    )
    examples_file: str | None = Field(
        None, min_length=1, description="Rows that may be shown as examples in prompts, such as the training file"
    )
    compare: list[str] = Field(
        default_factory=list, max_length=4, description="Other models, tuned ones included, that answer the same rows"
    )

    external: AskExternal | None = Field(
        None, description="A large prompted model at an external endpoint; only if the operator allows it"
    )

    @property
    def order(self) -> Order:
        """What is asked for, without the objects that it names."""
        return Order(
            **self.model_dump(
                exclude={
                    "model": True,
                    "eval_file": True,
                    "examples_file": True,
                    "compare": True,
                    "external": {"api_key"},
                }
            )
        )


class Baseline(ResponseBody):
    """Prompting of a model measured before any training. `table` is empty until the status is `succeeded`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "ftbaseline-abc123",
                    "object": "fine_tuning.baseline",
                    "created_at": 1719184911,
                    "finished_at": 1719185011,
                    "status": "succeeded",
                    "progress": 1.0,
                    "error": None,
                    **ASKED,
                    "max_rows": 200,
                    "max_new_tokens": "auto",
                    "seed": 0,
                    "columns": None,
                    "compare": [],
                    "external": None,
                    "currency": "USD",
                    "examples": 1000,
                    "left_out": 3,
                    "table": [ROW],
                    "cheapest": None,
                    "warnings": [],
                }
            ]
        }
    )

    id: str
    object: Literal["fine_tuning.baseline"] = "fine_tuning.baseline"
    created_at: int
    finished_at: int | None
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float = Field(description="Progress, from 0 to 1")
    error: str | None
    model: str
    eval_file: str
    examples_file: str | None
    shots: Literal["auto"] | list[int]
    retrieval: Retrieval
    max_rows: int
    max_new_tokens: int | Literal["auto"]
    seed: int
    target: Target | None
    columns: Columns | None
    compare: list[str]
    external: External | None
    currency: str = Field(description="Currency of the costs, set by the operator")
    examples: int | None = Field(description="Rows that may be shown as examples")
    left_out: int | None = Field(description="Examples that were excluded because an eval row asks nearly the same")
    table: list[Row] = Field(
        description="The baseline's rows, and those of fine-tunes of the model on the same eval rows"
    )
    cheapest: Row | None = Field(description="The cheapest row that meets the target, or may meet it; null: none does")
    warnings: list[str] = Field(
        default_factory=list, description="While the baseline runs: models that are too large for a worker's CPU"
    )

    @classmethod
    def of(cls, row: Stored, rows: list[Row], *, currency: str) -> "Baseline":
        order = Order.model_validate(row.order)
        result = row.result or {}
        return cls(
            id=row.id,
            created_at=seconds(row.created_at),
            finished_at=maybe_seconds(row.finished_at),
            **{name: getattr(row, name) for name in ("status", "progress", "error", "model", "eval_file")},
            examples_file=row.examples_file,
            **{name: getattr(order, name) for name in BaselineOptions.model_fields},
            compare=order.compare,
            external=order.external,
            currency=currency,
            examples=result.get("examples"),
            left_out=result.get("left_out"),
            table=rows,
            cheapest=table.cheapest(rows),
        )
