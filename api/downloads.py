"""Serves stored bytes: by a redirect to the storage if possible, else streamed."""

import base64
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from fastapi.responses import RedirectResponse, Response, StreamingResponse

from tunery.artifacts.model import Artifact
from tunery.errors import NotFound
from tunery.storage import Storage


def answer(storage: Storage, key: str, *, filename: str, bytes: int, sha256: str) -> Response:
    """Returns a redirect to a presigned URL, or the bytes. Raises ObjectMissing before anything is sent."""
    url = storage.presign(key, filename=filename)
    if url is not None:
        return RedirectResponse(url, 302)
    headers = {
        "content-length": str(bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        "etag": f'"{sha256}"',
        # A browser must never treat a user's file as a page of this site.
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(storage.read(key), media_type="application/octet-stream", headers=headers)


ARTIFACT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"example": "..."}}, "description": "The file's bytes"},
    302: {"description": "Redirect to the object storage; the address is valid for 15 minutes"},
}


def artifact(storage: Storage, files: Iterable[Artifact], path: str, *, owner: str) -> Response:
    """Returns the file called `path`; `owner` names what was asked for it. Raises NotFound, ObjectMissing."""
    for file in files:
        if file.path == path:
            filename = path.rpartition("/")[2]
            return answer(storage, file.key, filename=filename, bytes=file.bytes, sha256=file.sha256)
    raise NotFound(kind=f"artifact of {owner} named", id=path)


def result_file(storage: Storage, key: str, *, coded: bool) -> Response:
    """Returns a result file, in base64 if `coded`, as OpenAI serves it and scripts decode it."""
    content = b"".join(storage.read(key))
    if coded:
        return Response(base64.b64encode(content), media_type="application/octet-stream")
    return Response(content, media_type="text/csv")
