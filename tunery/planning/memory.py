"""The minimum memory of a run, from a base's config alone: no weights, no torch.

The minimum is one example at a time, of `rows` sequences of `max_seq_length` tokens, on a GPU with all activations
recomputed from layer inputs in the host's memory, and the input embedding there too, as the trainer does when memory is
short; or the loaded model, whose embedding has not moved yet. The trainer then measures and takes larger micro-batches
if they fit, as predicted by `expected.py`. Below this bound a run is impossible; above it, it may work. Sizes are of
one device; several GPUs hold a copy each.

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
    """Returns the minimum memory of a run on one `device` ("cuda" or "cpu"). `rows`: sequences of an example.

    `ranks`: over how many devices the model is sharded.
    """
    tokens = max_seq_length * rows
    # On a CPU the trainer does not probe: it takes at least this many tokens, whatever the memory.
    tokens = tokens if device == "cuda" else max(tokens, CPU_MICRO_BATCH)
    setting = Setting.of(model_info, technique, device, optimizer, ranks)
    layers = setting.shape.layers if device == "cuda" else 0
    offload = ranks == 1 and layers > 0
    training = peak.peak(setting, Step(tokens, labels=1, recompute=layers, offload=offload, host_embedding=True))
    found = max(training, peak.loaded(setting), key=lambda each: each.bytes)
    return Estimate(found.parts | {"fixed": PROCESS_BYTES[device]})


def moment_bytes(technique: Technique, device: str = "cuda") -> int:
    """Returns the bytes per trained weight of the optimizer's two moments."""
    return decide(technique, device).moment_bytes


def fits(model_info: Mapping[str, Any], technique: Technique, *, capacity: int, **asked: Any) -> bool:
    """Whether the run's minimum memory fits. `capacity`: bytes of one device; `asked`: as in `estimate`."""
    return estimate(model_info, technique, **asked).bytes <= capacity


def gib(size: int) -> str:
    """Formats a size: `24.0 GiB`."""
    return f"{size / GIB:.1f} GiB"
