"""The same prompts to several models: a base and what was made of it, side by side."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session, sessionmaker

from api import model_server
from api.dependencies import SessionsDep, StreamCallerDep
from api.json_route import LongJsonRoute
from api.model_server import Answered
from api.schemas import comparisons as schemas
from api.schemas.base import errors
from tunery.errors import InvalidValue
from tunery.models import registry

router = APIRouter(prefix="/v1/models", tags=["Models"], route_class=LongJsonRoute)


@router.post(
    "/compare",
    summary="Compare models' answers",
    response_model=schemas.Comparison,
    responses=errors(404, 429, 504) | schemas.ANSWER,
)
async def compare_models(
    request: Request, body: Annotated[schemas.AskComparison, Body()], caller: StreamCallerDep, sessions: SessionsDep
) -> Response:
    """Every model answers every prompt; the models in parallel, the prompts one after another. Each answer counts as a
    request towards the project's limits. Not in OpenAI's API."""
    models = await run_in_threadpool(_compared, sessions, caller.project_id, body.models)
    data = []
    for index, prompt in enumerate(body.prompts):
        messages = body.messages(prompt)
        asked = [{"model": model, "messages": messages, **body.sampling()} for model in models]
        answered = await _ask_all(request, caller.project_id, asked)
        if refused := next((one for one in answered if one.status != 200), None):
            return JSONResponse(refused.body, refused.status, refused.headers)
        answers = [_answer(model, one.body) for model, one in zip(models, answered, strict=True)]
        same = len({answer.content for answer in answers}) == 1
        data.append(schemas.ComparedPrompt(index=index, messages=messages, answers=answers, same=same))
    return JSONResponse(schemas.Comparison(models=models, data=data).model_dump(), headers=answered[-1].headers)


async def _ask_all(request: Request, project_id: str, asked: list[dict[str, Any]]) -> list[Answered]:
    asking = (model_server.ask(request, project_id, fields) for fields in asked)
    # All of them end before the first error is raised, so that none continues after the answer is sent.
    found = await asyncio.gather(*asking, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


def _answer(model: str, completion: dict[str, Any]) -> schemas.ComparedAnswer:
    [choice] = completion["choices"]
    usage = completion["usage"]
    return schemas.ComparedAnswer(
        model=model,
        content=choice["message"]["content"],
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


def _compared(sessions: sessionmaker[Session], project_id: str, names: list[str]) -> list[str]:
    """Returns the models, the base first where one alone is named. Raises ModelNotFound, WrongState, InvalidValue."""
    with sessions.begin() as session:
        found = [registry.find_ready(session, project_id, name) for name in names]
        if len(found) > 1:
            return names
        [model] = found
        if model.base_id is None:
            reason = f"'{names[0]}' is a base, and there is no other model to compare it with. Name a second model."
            raise InvalidValue(param="models", reason=reason)
        return [model.base_id, *names]
