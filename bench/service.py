"""What the service's benches share: an embedded stack with SmolLM2 in it, jobs through the API, what they ran on."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tunery import db, processes
from tunery.local import bases
from tunery.local.stack import Stack
from tunery.settings import get_settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BASE = "smollm2-135m-instruct"
PACKAGES = ("torch", "transformers", "peft", "celery", "sqlalchemy", "psycopg", "fastapi", "tunery")


@contextmanager
def running(home: Path, source: Path | None = None) -> Iterator[tuple[Stack, httpx2.Client]]:
    """A stack with everyday settings, SmolLM2 or the base in `source` in it as BASE, and a client with its key."""
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
    """The job's id, and the seconds that the answer took."""
    began = time.monotonic()
    answer = client.post("/fine_tuning/jobs", json={"model": BASE, "training_file": training_file, **fields})
    seconds = time.monotonic() - began
    return str(answer.raise_for_status().json()["id"]), seconds


def hardware() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def write(name: str, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(hardware() | found, indent=1) + "\n")
    print(json.dumps(found, indent=1), f"\nwritten to {path}")
