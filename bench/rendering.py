"""Measures what rendering chat templates in a separate process costs: `python -m bench.rendering`.

Renders one conversation alternately in this process and in the separate one, and takes the least time of many rounds,
as slower rounds are due to the machine's other work, not to the exchange.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tunery.rows import dialect, sandbox

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "What is the capital of France? " * 12},
        {"role": "assistant", "content": "The capital of France is Paris. " * 6},
    ],
    "add_generation_prompt": False,
}
ROUNDS, CALLS = 60, 300


def _microseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6


def measure(renderings: int) -> dict[str, float]:
    """Returns the microseconds of one row with this number of renderings."""
    now, batch = datetime.now(UTC), [ROW] * renderings
    here, there = dialect.Environment(), sandbox.Environment()
    ours, theirs = here.from_string(TEMPLATE), there.from_string(TEMPLATE)
    times = [
        (
            _microseconds(lambda: [here.render(ours, row, now) for row in batch]),
            _microseconds(lambda: there.render_all(theirs, batch, now)),
        )
        for _ in range(ROUNDS)
    ]
    least = [min(column) for column in zip(*times, strict=True)]
    return {"here": round(least[0], 1), "there": round(least[1], 1), "more": round(least[1] - least[0], 1)}


if __name__ == "__main__":
    print(json.dumps({f"{count} renderings": measure(count) for count in (1, 4, 12)}, indent=2))
