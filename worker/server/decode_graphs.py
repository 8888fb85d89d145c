"""Records the passes in which every row of a batch reads one token as CUDA graphs, and replays them.

The host launches well over a thousand kernels a pass, which takes it longer than the GPU needs for their work. A graph
is one launch. It reads and writes fixed addresses: it is replayed only while the slots, the rows and their adapters are
those with which it was recorded.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)

MOST = 16
"""Graphs that are kept for the rows of a lane."""
_EAGER = 2
"""Passes of a kind before it is recorded: rows that join and leave make many kinds that do not come again."""
_TOLERANCE = 2e-2
"""The relative difference of the logits of a graph and of the same pass without it. In bf16 the number of masked
positions changes sums in the third digit; a graph that reads a wrong address differs in the first."""
_ROUTED = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Config keys of mixtures of experts: the host reads the routing of each pass, which cannot be recorded."""

Work = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns the logits [rows, vocabulary] after tokens [rows, 1] at positions [rows, 1], all on the device."""


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Returns the tensor that will hold the work's result, and what does the work again; does not do it itself.

        Raises RuntimeError for work that waits for the device.
        """

    def forget(self) -> None:
        """Is called once nothing recorded is used any more."""


class CudaRecorder:
    """Records CUDA graphs, which share the memory of their intermediate results."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Takes another pool of memory: one that no graph uses is freed, and cannot be used again."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may load adapters meanwhile: their calls are not part of the graph, nor errors.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = work()
        return found, graph.replay


def recorder_for(model: Any) -> Callable[[], Recorder] | None:
    """Returns what makes a recorder of the model's passes; None where none can be, or need be."""
    config = model.config.get_text_config()
    if model.device.type != "cuda" or any(getattr(config, name, None) for name in _ROUTED):
        return None
    return CudaRecorder


@dataclass(frozen=True)
class _Recorded:
    tokens: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """The recorded passes of one lane."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._addresses: Hashable = None
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._is_broken = False

    def logits(
        self, addresses: Hashable, kind: Hashable, tokens: torch.Tensor, positions: torch.Tensor, work: Work
    ) -> torch.Tensor:
        """Returns the logits of a pass, by a graph if there is one of its `kind`. They are valid until the next pass.

        Graphs are dropped when `addresses` differs from the last pass's: then something that they read has moved.
        """
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses
        found = self._recorded.get(kind)
        if found is None:
            logits = work(tokens, positions)
            if self._is_due(kind):
                self._record(kind, tokens, positions, work, logits)
            return logits
        self._recorded.move_to_end(kind)
        found.tokens.copy_(tokens)
        found.positions.copy_(positions)
        found.replay()
        return found.logits

    def clear(self) -> None:
        """Drops all graphs, with the memory that they hold."""
        self._recorded.clear()
        self._seen.clear()
        self._recorder.forget()

    def _is_due(self, kind: Hashable) -> bool:
        self._seen[kind] = self._seen.pop(kind, 0) + 1
        if len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return self._seen.get(kind, 0) > _EAGER and not self._is_broken

    def _record(
        self, kind: Hashable, tokens: torch.Tensor, positions: torch.Tensor, work: Work, wanted: torch.Tensor
    ) -> None:
        """Records a pass whose logits are known. If they differ, or it cannot be recorded, none is from now on."""
        own = tokens.clone(), positions.clone()
        try:
            logits, replay = self._recorder.record(lambda: work(*own))
            replay()
            error = float((logits.float() - wanted.float()).norm() / wanted.float().norm())
        except RuntimeError as failure:
            self._give_up(str(failure).splitlines()[0])
            return
        if not error <= _TOLERANCE:  # NaN too
            self._give_up(f"a graph's logits differ by {error:.2g} of their norm")
            return
        self._recorded[kind] = _Recorded(*own, logits, replay)
        if len(self._recorded) > MOST:
            self._recorded.popitem(last=False)

    def _give_up(self, reason: str) -> None:
        log.warning("this model's passes are not recorded as CUDA graphs: %s", reason)
        self._is_broken = True
        self.clear()
