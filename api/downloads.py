"""Stored bytes on their way out: from storage itself where it can, else streamed through."""

import base64
from urllib.parse import quote

from fastapi.responses import RedirectResponse, Response, StreamingResponse

from tunery.storage import Storage


def answer(storage: Storage, key: str, *, filename: str, bytes: int, sha256: str) -> Response:
    """A redirect to a presigned URL, or the bytes. Raises ObjectMissing before anything is sent."""
    url = storage.presign(key, filename=filename)
    if url is not None:
        return RedirectResponse(url, 302)
    headers = {
        "content-length": str(bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        "etag": f'"{sha256}"',
        # A browser must never take a user's file for a page of ours.
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(storage.read(key), media_type="application/octet-stream", headers=headers)


def result_file(storage: Storage, key: str, *, coded: bool) -> Response:
    """A result file is small: a line a step. OpenAI serves its base64, and scripts decode it."""
    content = b"".join(storage.read(key))
    if coded:
        return Response(base64.b64encode(content), media_type="application/octet-stream")
    return Response(content, media_type="text/csv")
