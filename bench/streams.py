"""Measures what a streamed token costs between the back end and the client: `python -m bench.streams BASE OUT.json`.

BASE is a folder of any base; no model computes, as the back end writes words. Costs are the processor time of the API's
process and of the model server's, which a busy machine does not change much.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil

from bench import service
from tunery.local.stack import Stack

TOKENS, STREAMS, EACH = 3000, 200, 100
GOAL_SECONDS = 0.001


def cpu(stack: Stack) -> dict[str, float]:
    """Returns the processor seconds that the API and the model server have used."""
    found = {}
    for part in stack._services:
        if part.name in ("api", "server") and part.process is not None:
            times = psutil.Process(part.process.pid).cpu_times()
            found[part.name] = times.user + times.system
    return found


def stream(client: httpx2.Client, tokens: int) -> int:
    """Reads one stream; returns the number of words that came, or -1 if it was not whole."""
    body = {"model": service.BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens, "stream": True}
    words, whole = 0, False
    with client.stream("POST", "/chat/completions", json=body, timeout=300) as answer:
        if not answer.is_success:
            print(answer.status_code, answer.read().decode())
            return -1
        for line in answer.iter_lines():
            words += '"word ' in line
            whole = whole or line == "data: [DONE]"
    return words if whole else -1


def cost(stack: Stack, client: httpx2.Client, streams: int, tokens: int) -> dict[str, Any]:
    before = cpu(stack)
    with ThreadPoolExecutor(streams) as pool:
        got = list(pool.map(lambda _: stream(client, tokens), range(streams)))
    after = cpu(stack)
    total = streams * tokens
    return {
        "streams": streams,
        "tokens_each": tokens,
        "whole": sum(one == tokens for one in got),
        "seconds_a_token": {name: float(f"{(after[name] - before[name]) / total:.3g}") for name in after},
    }


def main() -> int:
    base, out = map(Path, sys.argv[1:])
    os.environ |= {
        "TUNERY_PLUGINS": "bench.words",
        "TUNERY_SERVER_BACKEND": "words",
        "TUNERY_SERVER_STREAMS": str(STREAMS),
        "TUNERY_OPEN_REQUESTS": str(2 * STREAMS),
    }
    with tempfile.TemporaryDirectory() as home, service.running(Path(home), base) as (stack, _):
        headers = {"Authorization": f"Bearer {stack.first_key}"}
        limits = httpx2.Limits(max_connections=STREAMS)
        url = f"{stack.api_url}/v1"
        with httpx2.Client(base_url=url, headers=headers, limits=limits, timeout=300, trust_env=False) as client:
            stream(client, 10)
            found = {"one": cost(stack, client, 1, TOKENS), "many": cost(stack, client, STREAMS, EACH)}
    found = service.hardware() | {"load": os.getloadavg(), "goal_seconds_a_token": GOAL_SECONDS} | found
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    met = found["one"]["seconds_a_token"]["api"] < GOAL_SECONDS and found["many"]["whole"] == STREAMS
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
