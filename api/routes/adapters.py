"""Imports of adapters that were trained elsewhere. The archive is streamed into storage and checked by a worker."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from sqlalchemy.orm import Session, sessionmaker

from api import multipart
from api.dependencies import SessionsDep, SettingsDep, StorageDep, StreamCallerDep
from api.multipart import Form
from api.schemas import models as schemas
from api.schemas.base import errors
from tunery.keys.auth import Caller
from tunery.models import imports, registry
from tunery.settings import Settings

router = APIRouter(prefix="/v1/models", tags=["Models"])

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["base", "file"],
                    "properties": {
                        "base": {
                            "type": "string",
                            "description": "The base that the adapter was trained on: its id, alias or hub id",
                        },
                        "suffix": {"type": "string", "description": "Part of the model's name", "example": ""},
                        "technique": {
                            "type": "string",
                            "enum": ["lora", "qlora"],
                            "default": "lora",
                            "description": "qlora: it was trained, and is served, on the base in four bits (nf4)",
                        },
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "A zip archive of the folder that PEFT's save_pretrained wrote",
                        },
                    },
                    "example": {"base": "SmolLM2-135M-Instruct"},
                }
            }
        },
    }
}


@router.post("/adapters", summary="Import an adapter", responses=errors(404, 413), openapi_extra=_FORM)
async def import_adapter(
    request: Request, caller: StreamCallerDep, sessions: SessionsDep, storage: StorageDep, settings: SettingsDep
) -> schemas.Model:
    """Imports a LoRA adapter of plain PEFT as a model of the project. Returns at once with `status: processing`; a
    worker checks it against its base, and if it cannot be used, `status_details` says why."""
    prefix = imports.new_prefix()
    key = imports.archive_key(prefix)
    async with contextmanager_in_threadpool(storage.writer(key)) as writer:
        form = await multipart.receive(
            request,
            file_field="file",
            limit=settings.max_upload_bytes,
            what="The archive",
            instead="Merge larger adapters into their base.",
            take=lambda _form, data: writer.write(data),
        )
        fields = multipart.parse_fields(form, schemas.AdapterFields)
    try:
        return await run_in_threadpool(_record, sessions, settings, caller, form, fields, prefix)
    except Exception:
        await run_in_threadpool(storage.delete, key)
        raise


def _record(
    sessions: sessionmaker[Session],
    settings: Settings,
    caller: Caller,
    form: Form,
    fields: schemas.AdapterFields,
    prefix: str,
) -> schemas.Model:
    """Returns the row, in a transaction that begins when all bytes are stored."""
    with sessions.begin() as session:
        base = registry.find_ready(session, caller.project_id, fields.base)
        known = registry.alias_of(session, base, fields.base) or base.id
        row = imports.add(
            session,
            project_id=caller.project_id,
            base=base,
            name=registry.tuned_name(base=known, organization=settings.organization, suffix=fields.suffix),
            prefix=prefix,
            source=(form.filename or "adapter.zip")[:255],
            technique=fields.technique,
        )
        session.refresh(row)
        return schemas.Model.of(row, owner=caller.project_name, aliases=[], for_administrator=caller.admin)
