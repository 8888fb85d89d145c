"""Shared parts of the service's benches: an embedded stack with SmolLM2 in it, and jobs through the API."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from bench.record import RESULTS as RESULTS
from bench.record import ROOT as ROOT
from bench.record import hardware as hardware
from bench.record import write as write
from tunery import db, processes
from tunery.local import bases
from tunery.local.stack import Stack
from tunery.settings import get_settings

BASE = "smollm2-135m-instruct"


@contextmanager
def running(home: Path, source: Path | None = None) -> Iterator[tuple[Stack, httpx2.Client]]:
    """Yields a stack with everyday settings that has SmolLM2 or the base in `source` as BASE, and its client."""
    stack = Stack(home, port=0)
    try:
        with stack:
            os.environ.update(stack.settings())
            get_settings.cache_clear()
            db.sessions.cache_clear()
            headers = {"Authorization": f"Bearer {stack.first_key}"}
            with httpx2.Client(base_url=f"{stack.api_url}/v1", headers=headers, timeout=60, trust_env=False) as client:
                _add_base(stack, client, source or bases.SMOLLM2.gguf())
                yield stack, client
            db.sessions().kw["bind"].dispose()
    finally:
        stack.postgres.remove()


def _add_base(stack: Stack, client: httpx2.Client, source: Path) -> None:
    client.post("/models", json={"id": BASE, "source": str(source)}).raise_for_status()
    until(lambda: client.get(f"/models/{BASE}").json()["status"] == "ready", stack)


def until(ready: Callable[[], bool], stack: Stack, *, seconds: float = 900, every: float = 0.1) -> None:
    def alive() -> bool:
        stack.check()
        return True

    met = processes.wait_until(ready, seconds=seconds, alive=alive, every=every)
    assert met, f"nothing after {seconds} s"


def upload(client: httpx2.Client, lines: list[str]) -> str:
    content = ("\n".join(lines) + "\n").encode()
    answer = client.post("/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", content)})
    return str(answer.raise_for_status().json()["id"])


def banking(rows: int) -> list[str]:
    return (ROOT / "examples/banking_train.jsonl").read_text().splitlines()[:rows]


def submit(client: httpx2.Client, training_file: str, **fields: Any) -> tuple[str, float]:
    """Submits a job; returns its id and the seconds until the answer."""
    began = time.monotonic()
    answer = client.post("/fine_tuning/jobs", json={"model": BASE, "training_file": training_file, **fields})
    seconds = time.monotonic() - began
    return str(answer.raise_for_status().json()["id"]), seconds
