"""Measures how long other requests wait while hostile bodies come in: `python -m bench.hostile`.

Four clients send the corpus of tests/fixtures/hostile_bodies.py to an embedded stack, with a key and without it;
meanwhile /healthz is requested every 20 ms.
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

from bench import service
from tunery.local.stack import Stack

sys.path.insert(0, str(service.ROOT / "tests/fixtures"))
import hostile_bodies

GOAL_SECONDS = 0.25
CLIENTS = 4


def measure(url: str, key: str | None) -> dict[str, Any]:
    waits = []
    with ThreadPoolExecutor(CLIENTS) as threads, httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
        sent = hostile_bodies.send_all(threads, url, key)
        while not all(one.done() for one in sent):
            began = time.monotonic()
            client.get("/healthz").raise_for_status()
            waits.append(time.monotonic() - began)
            time.sleep(0.02)
    statuses = dict(zip(hostile_bodies.CORPUS, (one.result() for one in sent), strict=True))
    return {"requests": len(waits), "median": statistics.median(waits), "worst": max(waits), "answers": statuses}


def main() -> int:
    with tempfile.TemporaryDirectory() as home:
        stack = Stack(Path(home), port=0)
        try:
            with stack:
                found = {name: measure(stack.api_url, key) for name, key in (("key", stack.first_key), ("none", None))}
        finally:
            stack.postgres.remove()
    worst = max(one["worst"] for one in found.values())
    what = "seconds that /healthz took while hostile bodies came in"
    service.write("hostile_cpu.json", {"what": what, "clients": CLIENTS, "goal_seconds": GOAL_SECONDS} | found)
    return 0 if worst < GOAL_SECONDS else 1


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
