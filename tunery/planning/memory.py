"""How much memory a run needs at the least, and what to change where it is not there. No weights, no torch.

"At the least" is one example at a time, of `rows` sequences of `max_seq_length` tokens, with activations recomputed on
a GPU, which is where the trainer goes when memory is short. It then measures and takes larger micro-batches where there
is room: `expected.py` says which. What is under this bound cannot run; what is above it may. Sizes are of one device;
several GPUs hold a copy each.

Units are bytes; `GiB` in messages is 2**30 of them, as on a card's box.
"""

from collections.abc import Mapping
from typing import Any

from tunery.planning import peak
from tunery.planning.expected import CPU_MICRO_BATCH, PROCESS_BYTES
from tunery.planning.peak import Estimate, Setting, Step
from tunery.planning.precision import decide
from tunery.spec import Technique

GIB = 2**30


def estimate(
    model_info: Mapping[str, Any],
    technique: Technique,
    *,
    max_seq_length: int,
    device: str = "cuda",
    rows: int = 1,
    optimizer: str = "adamw",
    ranks: int = 1,
) -> Estimate:
    """Returns the least that a run needs on one `device` ("cuda" or "cpu"). `rows`: of an example.

    `ranks`: over how many devices the model is cut, of which this is one.
    """
    tokens = max_seq_length * rows
    # A CPU has no probe: it takes so many tokens whatever memory there is.
    tokens = tokens if device == "cuda" else max(tokens, CPU_MICRO_BATCH)
    setting = Setting.of(model_info, technique, device, optimizer, ranks)
    found = peak.peak(setting, Step(tokens, labels=1, recompute=device == "cuda"))
    return Estimate(found.parts | {"fixed": PROCESS_BYTES[device]})


def moment_bytes(technique: Technique, device: str = "cuda") -> int:
    """Returns bytes of the optimizer's two moments of a weight that learns."""
    return decide(technique, device).moment_bytes


def fits(model_info: Mapping[str, Any], technique: Technique, *, capacity: int, **asked: Any) -> bool:
    """Whether the least that the run needs is there. `capacity`: bytes of one device; `asked`: as of `estimate`."""
    return estimate(model_info, technique, **asked).bytes <= capacity


def gib(size: int) -> str:
    """Returns a size for people: `24.0 GiB`."""
    return f"{size / GIB:.1f} GiB"
