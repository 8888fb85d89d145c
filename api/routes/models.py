"""Models: bases, and the results of jobs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from api import downloads
from api.dependencies import AdminDep, CallerDep, SessionDep, SettingsDep, StorageDep
from api.json_route import LongJsonRoute
from api.schemas import models as schemas
from api.schemas.base import WholeList, errors
from tunery.artifacts import model as artifacts
from tunery.datasets import files
from tunery.keys.auth import Caller
from tunery.keys.errors import Forbidden
from tunery.models import exports, registry, scores
from tunery.models.model import Model
from tunery.planning import engines
from tunery.planning.engines import ADAPTER
from tunery.settings import Settings

router = APIRouter(prefix="/v1/models", tags=["Models"], route_class=LongJsonRoute)


def _shown(session: Session, settings: Settings, caller: Caller, rows: Sequence[Model]) -> list[schemas.Model]:
    """Returns each model, and after it the same one under each of its aliases."""
    aliases = registry.aliases(session, (row.id for row in rows))
    owners = {None: settings.organization, caller.project_id: caller.project_name}
    return [
        schemas.Model.of(
            row,
            owner=owners[row.project_id],
            aliases=aliases.get(row.id, []),
            for_administrator=caller.admin,
            alias=alias,
        )
        for row in rows
        for alias in (None, *aliases.get(row.id, []))
    ]


@router.head("", include_in_schema=False)
@router.get("", summary="List models", responses=errors())
def list_models(
    session: SessionDep,
    caller: CallerDep,
    settings: SettingsDep,
    status: Annotated[Literal["ready", "any"], Query(description="any: also models that are not usable")] = "ready",
) -> WholeList[schemas.Model]:
    """Every base and its aliases, and the project's own fine-tuned models and checkpoints, newest first.

    Only ready models; `status=any` includes bases that are being converted or could not be.
    """
    rows = registry.list_visible(session, caller.project_id, only_ready=status == "ready")
    return WholeList(data=_shown(session, settings, caller, rows))


@router.post("", summary="Add a base model", responses=errors(403))
def add_model(body: schemas.AddModel, session: SessionDep, caller: AdminDep, settings: SettingsDep) -> schemas.Model:
    """For administrators. Returns at once with `status: processing`; a worker converts the files to safetensors."""
    name = body.id or registry.slug_of(body.source)
    row = registry.register_base(session, name=name, source=body.source, chat_template=body.chat_template)
    session.refresh(row)
    return _shown(session, settings, caller, [row])[0]


@router.post("/aliases", summary="Give a base model another name", responses=errors(403, 404))
def add_alias(body: schemas.AddAlias, session: SessionDep, caller: AdminDep) -> schemas.Alias:
    """For administrators: lets existing code run unchanged. An existing alias is moved to the new base."""
    row = registry.add_alias(session, body.alias, registry.find(session, caller.project_id, body.model))
    return schemas.Alias(alias=row.alias, model=row.model_id)


# Before the next: an id with slashes in it, as hub ids have, would be taken for one that ends with "artifacts".
@router.get("/{model}/artifacts", summary="List a model's files", responses=errors(404))
def list_model_artifacts(model: str, session: SessionDep, caller: CallerDep) -> WholeList[schemas.ModelArtifact]:
    """For a base, by id or alias, its weights, config and tokenizer; for a tuned model, its job's artifacts."""
    row = registry.find(session, caller.project_id, model)
    found = artifacts.list_for(session, row.id)
    return WholeList(
        data=[schemas.ModelArtifact(path=file.path, bytes=file.bytes, sha256=file.sha256) for file in found]
    )


@router.get(
    "/{model}/artifacts/{path:path}",
    summary="Download a model's file",
    response_class=Response,
    responses=errors(404) | downloads.ARTIFACT_ANSWERS,
)
def download_model_artifact(
    model: str, path: str, session: SessionDep, caller: CallerDep, storage: StorageDep
) -> Response:
    """One file. Its sha256 is in the list, and is the ETag if the API itself sends the bytes."""
    row = registry.find(session, caller.project_id, model)
    return downloads.artifact(storage, artifacts.list_for(session, row.id), path, owner=f"model '{model}'")


@router.get("/{model}/engines", summary="Show how to run a model elsewhere", responses=errors(404))
def list_engines(
    model: str, session: SessionDep, caller: CallerDep, storage: StorageDep
) -> WholeList[schemas.EngineCommand]:
    """A command for each engine that can run the model's artifacts; the first command downloads them."""
    row = registry.find_ready(session, caller.project_id, model)
    files = {file.path: file.key for file in artifacts.list_for(session, row.id)}
    paths, folder = list(files), "tuned" if row.base_id else "base"
    config = json.loads(b"".join(storage.read(files[ADAPTER]))) if engines.is_adapter(paths) else {}
    found = [engines.Command("download", "", engines.download(row.id, folder, paths))]
    found += engines.commands(paths, folder, config)
    return WholeList(data=[schemas.EngineCommand(**asdict(each)) for each in found])


@router.post("/{model}/exports", summary="Export a fine-tuned model", responses=errors(404))
def export_model(body: schemas.AskExport, model: str, session: SessionDep, caller: CallerDep) -> schemas.ModelExport:
    """Exports a whole model, merged from adapter and base and verified, or GGUF files. A worker makes them and adds
    them to the model's artifacts."""
    row = registry.find_ready(session, caller.project_id, model)
    if body.rows_file is not None:
        files.check_trainable(
            files.find(session, caller.project_id, body.rows_file, param="rows_file"), param="rows_file"
        )
    exports.ask(session, row, body.export, body.rows_file, body.columns)
    return schemas.ModelExport.of(row)


@router.get("/{model}/exports", summary="List a model's exports", responses=errors(404))
def list_exports(model: str, session: SessionDep, caller: CallerDep) -> WholeList[schemas.ModelExport]:
    """The last requested one, if any."""
    row = registry.find(session, caller.project_id, model)
    return WholeList(data=[schemas.ModelExport.of(row)] if row.export is not None else [])


@router.post("/{model}/scorecards", summary="Score an adapter", responses=errors(404))
def score_model(
    body: schemas.AskScorecard, model: str, session: SessionDep, caller: CallerDep
) -> schemas.ModelScorecard:
    """Base and adapter answer the rows of a test file and the general benchmark, without any training. A worker runs it
    and adds the answers to the model's artifacts."""
    row = registry.find_ready(session, caller.project_id, model)
    if (name := body.evaluation.test_file) is not None:
        param = "evaluation.test_file"
        files.check_trainable(files.find(session, caller.project_id, name, param=param), param=param)
    scores.ask(session, row, body.evaluation, body.columns)
    return schemas.ModelScorecard.of(row)


@router.get("/{model}/scorecards", summary="List a model's scorecards", responses=errors(404))
def list_scorecards(model: str, session: SessionDep, caller: CallerDep) -> WholeList[schemas.ModelScorecard]:
    """The last requested one, if any. A job's own scorecard is part of the job."""
    row = registry.find(session, caller.project_id, model)
    return WholeList(data=[schemas.ModelScorecard.of(row)] if row.scoring is not None else [])


@router.get("/{model:path}", summary="Retrieve a model", responses=errors(404))
def retrieve_model(model: str, session: SessionDep, caller: CallerDep, settings: SettingsDep) -> schemas.Model:
    """By id, alias, or a base's hub id. An alias is returned under its own name."""
    row = registry.find(session, caller.project_id, model)
    named = {shown.id: shown for shown in _shown(session, settings, caller, [row])}
    return named.get(model, named[row.id])


@router.delete("/{model:path}", summary="Delete a fine-tuned model", responses=errors(403, 404))
def delete_model(model: str, session: SessionDep, caller: CallerDep) -> schemas.ModelDeleted:
    """Its job is kept. Only administrators can delete a base; deleting an alias keeps its base."""
    row = registry.find(session, caller.project_id, model, with_withheld=True)
    if row.kind == "base" and not caller.admin:
        raise Forbidden(action="delete a base model or its alias")
    if model == row.id:
        registry.delete(session, row)
    else:
        registry.remove_alias(session, row, model)
    return schemas.ModelDeleted(id=model)
