"""The commands' client of the API, whose errors say what to change."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tunery.errors import TuneryError
from tunery.local import state
from tunery.local.paths import UNPROXIED

HOME = Path(".tunery/up")
"""Where `tunery up` keeps its state by default."""


class Refused(TuneryError):
    """{message}"""

    code = "refused"

    @property
    def of_api(self) -> str | None:
        """The code of the API's error, if it is one."""
        return self.fields.get("of_api")


class NoAnswer(TuneryError):
    """No answer from {url} ({reason}). Start the API on this machine with `tunery up`, or set TUNERY_API_URL to its
    address."""

    code = "no_answer"


class NoKey(TuneryError):
    """No API key. Set TUNERY_API_KEY or pass --key; `tunery up` printed the first key, and `tunery keys create` makes
    others."""

    code = "no_key"


@dataclass
class ApiClient:
    """Calls the API at `url`, which ends before `/v1`, with a key."""

    url: str
    key: str

    def call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """Returns the answer's JSON. Raises Refused with the API's message, NoAnswer."""
        with self._client() as client, _explained(self.url):
            answer = client.request(method, path, **request)
            _check(answer)
            return dict(answer.json())

    def pages(self, path: str, *, limit: int, **query: Any) -> list[dict[str, Any]]:
        """Returns up to `limit` objects of a list, over as many pages as needed."""
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            after = {"after": found[-1]["id"]} if found else {}
            page = self.call("GET", path, params={"limit": min(100, limit - len(found)), **query, **after})
            found += page["data"]
            if not page.get("has_more") or not page["data"]:
                break
        return found

    def stream(self, path: str, *, body: Any = None, **query: Any) -> Iterator[bytes]:
        """Yields the bytes of an answer as they arrive, without a time limit; with a body the request is a POST."""
        method = "GET" if body is None else "POST"
        timeout = httpx2.Timeout(30, read=None)
        with (
            self._client() as client,
            _explained(self.url),
            client.stream(method, path, params=query, json=body, timeout=timeout) as answer,
        ):
            if answer.is_error:
                answer.read()
                _check(answer)
            yield from answer.iter_bytes()

    def download(self, path: str, target: Path) -> None:
        """Writes the bytes of an answer into a file."""
        with target.open("wb") as file:
            for chunk in self.stream(path):
                file.write(chunk)

    def _client(self) -> httpx2.Client:
        if not self.key:
            raise NoKey
        return httpx2.Client(
            base_url=f"{self.url}/v1",
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=httpx2.Timeout(60, connect=5),
            follow_redirects=True,
            mounts=UNPROXIED,
        )


def connect(url: str | None, key: str | None, home: Path) -> ApiClient:
    """Returns a client by option, then TUNERY_API_URL, then the stack in `home`, then port 8000 of this machine."""
    local = state.running(home)
    url = url or os.environ.get("TUNERY_API_URL") or (local or {}).get("api_url") or "http://127.0.0.1:8000"
    return ApiClient(url.rstrip("/").removesuffix("/v1"), key or os.environ.get("TUNERY_API_KEY", ""))


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        raise NoAnswer(url=url, reason=str(error) or type(error).__name__) from error


def _check(answer: httpx2.Response) -> None:
    if answer.is_success:
        return
    code = None
    try:
        error = answer.json()["error"]
        message, code = error["message"], error.get("code")
    except (ValueError, KeyError, TypeError):
        message = (
            f"{answer.request.url} answered {answer.status_code}, which is not a response of Tunery. Check "
            "TUNERY_API_URL or --api-url."
        )
    raise Refused(message=message, of_api=code)
