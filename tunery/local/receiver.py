"""A webhook receiver for one machine, which verifies events with the official client and keeps the valid ones."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from openai import InvalidWebhookSignatureError, OpenAI


class Receiver:
    """Listens on a free port of 127.0.0.1 while it is entered. `secret` comes with the endpoint, so it is set later."""

    def __init__(self) -> None:
        self.secret: str | None = None
        self.refused: list[str] = []
        self._verified: list[tuple[str, str]] = []
        self._arrived = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/webhooks"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for(self, event_type: str, job: str, *, seconds: float) -> bool:
        """Waits for a verified event of this type about this job; returns whether it came within `seconds`."""
        with self._arrived:
            return self._arrived.wait_for(lambda: (event_type, job) in self._verified, timeout=seconds)

    def take(self, body: bytes, headers: dict[str, str]) -> int:
        """Keeps an event whose signature is valid; returns the HTTP status to answer with."""
        try:
            event: Any = OpenAI(api_key="unused").webhooks.unwrap(body, headers, secret=self.secret)
        except (InvalidWebhookSignatureError, ValueError) as error:
            self.refused.append(str(error))
            return 400
        with self._arrived:
            self._verified.append((event.type, event.data.id))
            self._arrived.notify_all()
        return 204


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(receiver.take(body, dict(self.headers)))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing, so that the progress bar is not disturbed."""

    return Handler
