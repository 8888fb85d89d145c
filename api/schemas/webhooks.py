"""Webhook endpoints, as the API spells them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, StrictBool

from api.schemas.base import Body, Deleted, ResponseBody, maybe_seconds, seconds
from tunery.webhooks import model, signing
from tunery.webhooks.deliveries import Delivered
from tunery.webhooks.messages import EVENT_TYPES
from tunery.webhooks.model import WebhookEndpoint

ENDPOINT: dict[str, Any] = {
    "id": "we_abc123",
    "object": "webhook_endpoint",
    "created_at": 1719184911,
    "updated_at": 1719184911,
    "name": "training",
    "url": "https://example.com/hooks",
    "event_types": list(EVENT_TYPES),
    "signing_secret_hint": "...Gx0eHw==",
    "disabled_reason": None,
    "last_delivery": None,
}


TRY: dict[str, Any] = {"at": 1719184912, "seconds": 0.31, "status_code": 500, "error": "the receiver answered 500"}
DELIVERY: dict[str, Any] = {
    "id": "wh_abc123",
    "object": "webhook_delivery",
    "created_at": 1719184911,
    "event_type": "fine_tuning.job.succeeded",
    "data": {"id": "ftjob-abc123"},
    "status": "pending",
    "next_try_at": 1719184917,
    "finished_at": None,
    "tries": [TRY],
}


class CreateEndpoint(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{name: ENDPOINT[name] for name in ("name", "url", "event_types")}],
        }
    )

    name: str
    url: str = Field(max_length=2048)
    event_types: list[str]


class UpdateEndpoint(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"event_types": ["fine_tuning.job.failed"]}]})

    name: str | None = None
    url: str | None = Field(None, max_length=2048)
    event_types: list[str] | None = Field(None, description="All event types")


class RotateSecret(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"keep_old_secret_active_for_24_hours": True}]})

    keep_old_secret_active_for_24_hours: StrictBool | None = None


class TestEndpoint(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"event_type": "fine_tuning.job.succeeded"}]})

    event_type: str


class Endpoint(ResponseBody):
    model_config = ConfigDict(json_schema_extra={"examples": [ENDPOINT]})

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int | None
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str | None
    disabled_reason: str | None = Field(None, description="Why the endpoint is disabled; a new url enables it again")
    last_delivery: "WebhookDelivery | None" = Field(None, description="The newest event for this endpoint")

    @classmethod
    def of(cls, row: WebhookEndpoint, last: Delivered | None = None) -> "Endpoint":
        return cls(**_values(row, last))


class EndpointWithSecret(Endpoint):
    """The only two answers that show a secret: creation and rotation."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{**ENDPOINT, "signing_secret": "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX"}]}
    )

    signing_secret: str

    @classmethod
    def of(cls, row: WebhookEndpoint, last: Delivered | None = None) -> "EndpointWithSecret":
        return cls(**_values(row, last), signing_secret=row.secret)


def _values(row: WebhookEndpoint, last: Delivered | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "created_at": seconds(row.created_at),
        "updated_at": seconds(row.updated_at),
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "signing_secret_hint": signing.hint(row.secret),
        "disabled_reason": row.disabled_reason,
        "last_delivery": WebhookDelivery.of(last) if last else None,
    }


class DeliveryTry(ResponseBody):
    """One try. `error` says why it failed; without `seconds` it has not ended."""

    model_config = ConfigDict(json_schema_extra={"examples": [TRY]})

    at: int
    seconds: float | None
    status_code: int | None = Field(description="The receiver's; null if there was no response")
    error: str | None

    @classmethod
    def of(cls, row: model.DeliveryTry) -> "DeliveryTry":
        lasted = None if row.seconds is None else round(row.seconds, 3)
        return cls(at=seconds(row.at), seconds=lasted, status_code=row.status_code, error=row.error)


class About(ResponseBody):
    id: str = Field(description="The job, file or baseline")


class WebhookDelivery(ResponseBody):
    """An event for an endpoint. Its id is the message's `webhook-id`."""

    model_config = ConfigDict(json_schema_extra={"examples": [DELIVERY]})

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    created_at: int
    event_type: str
    data: About
    status: Literal["pending", "delivered", "failed"] = Field(description="pending: it will be tried (again)")
    next_try_at: int | None
    finished_at: int | None
    tries: list[DeliveryTry]

    @classmethod
    def of(cls, found: Delivered) -> "WebhookDelivery":
        row = found.delivery
        return cls(
            id=row.id,
            created_at=seconds(row.created_at),
            event_type=found.event_type,
            data=About(id=found.about),
            status=row.state,
            next_try_at=maybe_seconds(row.next_try_at),
            finished_at=maybe_seconds(row.finished_at),
            tries=[DeliveryTry.of(one) for one in found.tries],
        )


class EndpointDeleted(Deleted):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "we_abc123", "object": "webhook_endpoint.deleted", "deleted": True}]}
    )

    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"


class EndpointTest(ResponseBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "webhook_endpoint.test",
                    "webhook_endpoint_id": "we_abc123",
                    "event_type": "fine_tuning.job.succeeded",
                    "status_code": 200,
                    "success": True,
                }
            ]
        }
    )

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int = Field(description="The receiver's response, whatever it was")
    success: Literal[True] = True
