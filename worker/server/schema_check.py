"""Compiles JSON schemas in a process that can be killed, before the model server does.

llguidance intersects patterns that apply to one text when it compiles them. That takes time and memory exponential in
their number, which none of its limits bounds, and no thread can be stopped in it.
"""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import llguidance

from tunery.errors import Unavailable

log = logging.getLogger(__name__)

CPU_SECONDS, MEMORY_BYTES = 4, 2**30
"""Of a process. A schema of 5,000 properties, OpenAI's limit, takes about a second and 0.3 GB."""
_WALL_SECONDS = 30
_KILLED = (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGABRT)
"""How the process ends at a limit: Rust aborts without memory."""
_PROGRAM = f"""
import sys; sys.path.insert(0, sys.argv[1])
import json, llguidance, resource
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS + 1}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
limits = llguidance.LLParserLimits(**json.loads(sys.argv[2]))
for grammar in json.load(sys.stdin):
    llguidance.LLMatcher.validate_grammar(grammar, llguidance.LLTokenizer("byte"), limits=limits)
"""


def can_be_compiled(grammars: Sequence[str], limits: dict[str, int]) -> bool:
    """Whether compiling these ends within the limits, with or without an error. Raises Unavailable if no process can be
    started.
    """
    return _ends(tuple(grammars), json.dumps(limits))


@lru_cache(1024)
def _ends(grammars: tuple[str, ...], limits: str) -> bool:
    packages = str(Path(llguidance.__file__).parents[1])
    try:
        # Isolated, and without site-packages' start-up files, which would take longer than most schemas.
        ended = subprocess.run(
            [sys.executable, "-ISB", "-c", _PROGRAM, packages, limits],
            input=json.dumps(grammars).encode(), capture_output=True, env={}, timeout=_WALL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    except OSError as error:
        raise Unavailable(part="The process that compiles schemas") from error
    if ended.returncode in _KILLED or b"MemoryError" in ended.stderr:
        return False
    if ended.returncode:  # the server meets the same error, or one that says nothing of the schema
        log.warning("a schema was not compiled in a process of its own: %s", ended.stderr.decode(errors="replace"))
    return True
