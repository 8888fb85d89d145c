"""Webhook endpoints, which get an event when a job ends."""

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.dependencies import ANY_KEY, After, CallerDep, SessionDep, SessionsDep, SettingsDep, StreamCallerDep, UpTo100
from api.json_route import JsonRoute
from api.schemas import webhooks as schemas
from api.schemas.base import CursorList, WholeList, errors
from tunery.webhooks import deliveries, endpoints
from tunery.webhooks.messages import EVENT_TYPES

router = APIRouter(prefix="/v1", tags=["Webhooks"], route_class=JsonRoute)


@router.post("/webhook_endpoints", summary="Create a webhook endpoint", responses=errors())
def create_webhook_endpoint(
    body: schemas.CreateEndpoint, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> schemas.EndpointWithSecret:
    """The response shows the signing secret once. The url must be https and lead to a public address, unless the
    operator allows others (`TUNERY_WEBHOOK_ALLOW`)."""
    row = endpoints.create(
        session,
        caller.project_id,
        name=body.name,
        url=body.url,
        event_types=body.event_types,
        allow=settings.webhook_allow,
    )
    return schemas.EndpointWithSecret.of(row)


@router.get("/webhook_endpoints", summary="List webhook endpoints", responses=errors(404))
def list_webhook_endpoints(
    session: SessionDep,
    caller: CallerDep,
    after: After = None,
    limit: UpTo100 = 20,
) -> CursorList[schemas.Endpoint]:
    """Newest first."""
    rows, more = endpoints.list_page(session, caller.project_id, after=after, limit=limit)
    last = deliveries.latest(session, [row.id for row in rows])
    data = [schemas.Endpoint.of(row, last.get(row.id)) for row in rows]
    return CursorList.of(data, has_more=more)


@router.get("/webhook_endpoints/{endpoint_id}", summary="Retrieve a webhook endpoint", responses=errors(404))
def retrieve_webhook_endpoint(endpoint_id: str, session: SessionDep, caller: CallerDep) -> schemas.Endpoint:
    row = endpoints.retrieve(session, caller.project_id, endpoint_id)
    return schemas.Endpoint.of(row, _last(session, row.id))


@router.post("/webhook_endpoints/{endpoint_id}", summary="Change a webhook endpoint", responses=errors(404))
def update_webhook_endpoint(
    endpoint_id: str, body: schemas.UpdateEndpoint, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> schemas.Endpoint:
    """Changes only the given fields. Setting the url enables a disabled endpoint again."""
    changes = body.model_dump(exclude_none=True)
    row = endpoints.update(session, caller.project_id, endpoint_id, **changes, allow=settings.webhook_allow)
    return schemas.Endpoint.of(row, _last(session, row.id))


def _last(session: Session, endpoint_id: str) -> deliveries.Delivered | None:
    return deliveries.latest(session, [endpoint_id]).get(endpoint_id)


@router.get(
    "/webhook_endpoints/{endpoint_id}/deliveries", summary="List an endpoint's deliveries", responses=errors(404)
)
def list_webhook_deliveries(
    endpoint_id: str,
    session: SessionDep,
    caller: CallerDep,
    after: After = None,
    limit: UpTo100 = 20,
) -> CursorList[schemas.WebhookDelivery]:
    """Newest first, each with its tries: the status code of the receiver's response, or why there was none. Ended ones
    are kept for 30 days, unless the operator chose otherwise (`TUNERY_KEEP_DELIVERIES_DAYS`)."""
    row = endpoints.retrieve(session, caller.project_id, endpoint_id)
    found, more = deliveries.list_page(session, row.id, after=after, limit=limit)
    return CursorList.of([schemas.WebhookDelivery.of(one) for one in found], has_more=more)


@router.delete("/webhook_endpoints/{endpoint_id}", summary="Delete a webhook endpoint", responses=errors(404))
def delete_webhook_endpoint(endpoint_id: str, session: SessionDep, caller: CallerDep) -> schemas.EndpointDeleted:
    endpoints.delete(session, caller.project_id, endpoint_id)
    return schemas.EndpointDeleted(id=endpoint_id)


@router.post(
    "/webhook_endpoints/{endpoint_id}/rotate_secret", summary="Rotate an endpoint's secret", responses=errors(404)
)
def rotate_webhook_secret(
    endpoint_id: str, session: SessionDep, caller: CallerDep, body: schemas.RotateSecret | None = None
) -> schemas.EndpointWithSecret:
    """The response shows the new secret once. The old one can also sign for 24 hours."""
    keep = body is not None and bool(body.keep_old_secret_active_for_24_hours)
    row = endpoints.rotate_secret(session, caller.project_id, endpoint_id, keep_old=keep)
    return schemas.EndpointWithSecret.of(row, _last(session, row.id))


@router.post("/webhook_endpoints/{endpoint_id}/test", summary="Send a test event", responses=errors(404))
def test_webhook_endpoint(
    endpoint_id: str, body: schemas.TestEndpoint, caller: StreamCallerDep, sessions: SessionsDep, settings: SettingsDep
) -> schemas.EndpointTest:
    """Sends one signed message, once. 400 if the receiver sends no HTTP response."""
    with sessions.begin() as session:
        message = endpoints.sample(session, caller.project_id, endpoint_id, body.event_type)
    status = endpoints.deliver_sample(message, settings)
    return schemas.EndpointTest(webhook_endpoint_id=endpoint_id, event_type=body.event_type, status_code=status)


@router.get("/webhook_event_types", summary="List event types", responses=errors(), dependencies=[ANY_KEY])
def list_webhook_event_types() -> WholeList[str]:
    return WholeList(data=list(EVENT_TYPES))
