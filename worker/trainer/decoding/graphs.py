"""Records decoding steps, in which every row of a batch reads one token, as CUDA graphs, and replays them.

The host launches well over a thousand kernels a pass, which takes it longer than the GPU needs for their work. A graph
is one launch. It reads and writes fixed addresses: those of its inputs, to which each pass's are copied, and those of
the weights and slots, with which it was recorded.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from worker.trainer import experts

log = logging.getLogger(__name__)

MOST = 16
"""The most graphs that are kept."""
RARE = 2
"""Passes of a kind before it is recorded, where rows join and leave so often that many kinds never recur."""
_TOLERANCE = 0.1
"""The relative difference of a row's logits by a graph from those of the same pass without one. On an H200 the same
pass of an 8B model in bf16, computed twice, differed by up to 0.043 in a batch of 32 (cuBLAS splits sums among blocks
that end in any order); a graph that reads a wrong address changes the first digit."""

Work = Callable[..., torch.Tensor]
"""Returns the logits [rows, vocabulary] of a pass from its inputs: tokens [rows, 1], positions [rows, 1] and whatever
else differs between passes of a kind, all on the device."""


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Returns the tensor that will hold the work's result, and a function that does the work: recording does not.

        Raises RuntimeError for work that waits for the device.
        """

    @property
    def nbytes(self) -> int:
        """Bytes that the recordings hold."""

    def forget(self) -> None:
        """Releases what recordings share; is called when none is used any more."""


class Lender(Protocol):
    """Memory that recordings may take while nothing else needs it."""

    def lend(self, holder: object, nbytes: int, free: Callable[[], None]) -> bool:
        """Lends memory, in place of what the holder had, until it is released or taken back by calling `free`; returns
        whether there is room.
        """

    def use(self, holder: object) -> None:
        """Makes a loan the last to be taken back."""

    def release(self, holder: object) -> None:
        """Ends a loan, if there is one."""


class CudaRecorder:
    """Records CUDA graphs, which share the memory of their intermediate results."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Starts a new pool of memory: the old one is freed with its last graph, and must not be used again."""
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def nbytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if one["segment_pool_id"] == self._pool)

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # Other threads may load adapters meanwhile: their calls are not part of the graph, nor errors.
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = work()
        finally:
            torch.cuda.set_stream(before)  # torch stays in the recording's if that cannot be ended
        return found, graph.replay


def recorder_for(model: Any) -> Callable[[], Recorder] | None:
    """Returns what makes a recorder of the model's passes; None on a CPU and for mixtures of experts, the routing of
    which the host reads in each pass.
    """
    if model.device.type != "cuda" or experts.are_in(model.config.get_text_config()):
        return None
    return CudaRecorder


@dataclass(frozen=True)
class _Recorded:
    inputs: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """The recorded passes over one cache."""

    def __init__(self, recorder: Recorder, memory: Lender | None = None, *, eager: int = RARE) -> None:
        """`memory`: which recordings may take; None: any. `eager`: the passes of a kind before it is recorded."""
        self._recorder = recorder
        self._memory = memory
        self._needed = 0  # bytes of all graphs after the last recording, also when they were dropped since
        self._eager = eager
        self._addresses: Hashable = None
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self.is_broken = False
        """Whether a recording was wrong, or impossible: nothing is recorded any more."""

    def logits(self, addresses: Hashable, kind: Hashable, inputs: tuple[torch.Tensor, ...], work: Work) -> torch.Tensor:
        """Returns the logits of a pass, by a graph if there is one of its kind. They are valid until the next pass.

        `kind`: what differs between graphs, such as the number of rows. `addresses`: changes when something moves that
        graphs read or write besides their inputs; then all are dropped.
        """
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses
        found = self._recorded.get(kind)
        if found is None:
            logits = work(*inputs)
            if self._is_due(kind):
                self._record(kind, inputs, work, logits)
            return logits
        self._recorded.move_to_end(kind)
        if self._memory is not None:
            self._memory.use(self)
        for own, given in zip(found.inputs, inputs, strict=True):
            own.copy_(given)
        found.replay()
        return found.logits

    @property
    def any(self) -> bool:
        """Whether there are graphs."""
        return bool(self._recorded)

    def clear(self) -> None:
        """Drops all graphs, with the memory that they hold."""
        if self._memory is not None:
            self._memory.release(self)
        self._recorded.clear()
        self._seen.clear()
        self._recorder.forget()

    def _is_due(self, kind: Hashable) -> bool:
        self._seen[kind] = self._seen.pop(kind, 0) + 1
        if len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return self._seen.get(kind, 0) > self._eager

    def _record(self, kind: Hashable, inputs: tuple[torch.Tensor, ...], work: Work, wanted: torch.Tensor) -> None:
        """Records a pass whose logits are known. If they differ, or it cannot be recorded, none is from now on."""
        if not bool(wanted.isfinite().all()):
            return  # an adapter's fault, which says nothing about graphs
        if not self._has_room(self._needed):
            return
        own = tuple(one.clone() for one in inputs)
        try:
            logits, replay = self._recorder.record(lambda: work(*own))
            replay()
            errors = (logits.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
            error = float(errors.max())
        except torch.OutOfMemoryError:
            self.clear()  # there may be room later
            return
        except Exception as failure:  # noqa: BLE001  whatever it is, the pass itself has succeeded
            self._give_up(str(failure).partition("\n")[0])
            return
        if not error <= _TOLERANCE:  # NaN too
            self._give_up(f"a row's logits by a graph differ by {error:.2g} of their norm")
            return
        self._recorded[kind] = _Recorded(own, logits, replay)
        if len(self._recorded) > MOST:
            self._recorded.popitem(last=False)
        self._needed = self._recorder.nbytes
        self._has_room(self._needed)

    def _has_room(self, nbytes: int) -> bool:
        """Whether all graphs may take these bytes; if not, all are dropped: one alone frees none of what they share."""
        if self._memory is None or self._memory.lend(self, nbytes, self.clear):
            return True
        self.clear()
        return False

    def _give_up(self, reason: str) -> None:
        log.warning("decoding steps are not recorded as CUDA graphs: %s", reason)
        self.is_broken = True
        self.clear()
