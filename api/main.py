"""The application: `uvicorn --factory api.main:create_app`."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from sqlalchemy.orm import Session, sessionmaker

from api import errors
from api.middleware import Edge
from api.routes import (
    adapters,
    advice,
    baselines,
    captures,
    chat,
    cleanings,
    comparisons,
    completions,
    files,
    health,
    jobs,
    metrics,
    models,
    previews,
    reports,
    responses,
    runs,
    unsupported,
    uploads,
    usage,
    webhooks,
)
from api.schemas import base
from api.web import docs
from tunery import db, plugins
from tunery.settings import Settings, ending_if_wrong, get_settings, settings_or_exit
from tunery.storage import open_storage

DESCRIPTION = """
Fine-tuning on your own machines behind OpenAI's Files and Fine-tuning API: point an OpenAI client's `base_url` here.

Press **Authorize** and paste a project's key (`tunery keys create`), then **Try it out** on any operation. Upload a
training file first: in the examples of jobs, `file-abc123` and `file-def456` stand for the last two that were uploaded.
"""
ROUTERS = (
    files,
    reports,
    cleanings,
    previews,
    uploads,
    jobs,
    advice,
    baselines,
    runs,
    adapters,
    captures,
    comparisons,
    models,
    chat,
    completions,
    responses,
    usage,
    webhooks,
    unsupported,
    health,
    metrics,
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application on `settings`, or on the environment's. Connects to nothing before the first request."""
    settings = settings or settings_or_exit()
    plugins.load(settings.plugins, "api")
    app = FastAPI(
        title="Tunery",
        version="0.1.0",
        description=DESCRIPTION,
        docs_url=None,  # ours needs no CDN, see api.web.docs
        redoc_url=None,
        # A redirect would name the Host that the caller made up, and come before the key is asked for.
        redirect_slashes=False,
        lifespan=_lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.settings = settings
    with ending_if_wrong():
        app.state.storage = open_storage(settings)
    app.state.sessions = _sessions(settings)
    app.state.open_requests = Counter()  # by project: see api.metering
    for module in ROUTERS:
        app.include_router(module.router)
    docs.install(app)
    errors.install(app)
    app.add_middleware(Edge)
    _describe(app)
    return app


def _sessions(settings: Settings) -> sessionmaker[Session]:
    if settings.database_url == get_settings().database_url:
        return db.sessions()
    return db.make_sessions(db.make_engine(settings.database_url))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.sessions.kw["bind"].dispose()


def _describe(app: FastAPI) -> None:
    """Two things that FastAPI's document gets wrong here.

    It has a 422 for every route, where a request that is not valid gets a 400 as in OpenAI's API; and it drops every
    null from the examples, where clients of this dialect count on keys being there.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = document["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for name, examples in base.examples().items():
            if name in schemas:
                schemas[name]["examples"] = examples
        return document

    app.openapi = openapi  # type: ignore[method-assign]
