"""The ranks of a run: one process per device, each with a copy of the model or its shard of it.

Every rank takes part in every call here and gets the same answer, so all make the same decisions. Saving is called on
every rank and decides inside which one writes.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, distributed

from worker.trainer import pieces
from worker.trainer.stop_signal import Stopped, StopSignal

PATIENCE = timedelta(hours=2)
"""How long ranks wait for each other: rank 0 may export a large model meanwhile. The end of a rank is noticed at once
by the process that started it, without this limit.
"""


def accelerator() -> Accelerator:
    """Returns this rank's device and its connection to the others, if the environment names any."""
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waiting])


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them."""

    accelerator: Accelerator
    lockstep: Callable[[], AbstractContextManager[None]] = nullcontext
    """Returns the context in which ranks may run different numbers of passes: see `sharding.Shards.lockstep`."""

    @property
    def index(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and messages for all."""
        return bool(self.accelerator.is_main_process)

    def sum(self, numbers: Tensor) -> Tensor:
        """Returns the sum over all ranks."""
        if self.count == 1:
            return numbers
        total = numbers.clone()
        distributed.all_reduce(total)
        return total

    def most(self, number: int) -> int:
        """Returns the largest of the ranks' numbers."""
        return int(max(self.gather(number)))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor([float(flag)], device=self.device)))

    def check(self, stop_signal: StopSignal) -> None:
        """Raises Stopped on every rank if one of them was asked to stop."""
        if self.any(stop_signal.received):
            raise Stopped

    def turns(self, stop_signal: StopSignal, busy: Callable[[], bool]) -> Iterator[None]:
        """Yields turns until no rank is busy: a rank that is done early takes part to the end.

        Raises Stopped between two turns, at the same one on every rank.
        """
        while True:
            flags = torch.tensor([float(busy()), float(stop_signal.received)], device=self.device)
            working, asked = self.sum(flags).tolist()
            if asked:
                raise Stopped
            if not working:
                return
            with self.lockstep():
                yield

    def share_weights(self, parameters: Iterable[Tensor]) -> None:
        """Copies rank 0's weights to every rank: equal seeds give equal weights on equal GPUs only."""
        if self.count > 1:
            for parameter in parameters:
                sent = parameter.data.contiguous()
                distributed.broadcast(sent.reshape(-1).view(torch.uint8), 0)  # gloo does not support every type
                if not parameter.data.is_contiguous():
                    parameter.data.copy_(sent)

    def broadcast(self, found: Any) -> Any:
        """Returns rank 0's value on every rank."""
        return found if self.count == 1 else broadcast_object_list([found])[0]

    def norm(self, parameters: Iterable[torch.nn.Parameter]) -> Tensor:
        """Returns the gradient's norm: over all ranks for pieces, on one rank for whole weights."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for parameter in (p for p in parameters if p.grad is not None):
            place = 0 if pieces.of(parameter) is None else 1
            squares[place] += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double() ** 2
        return (squares[0] + self.sum(squares[1])).sqrt()

    def gather(self, found: Any) -> list[Any]:
        """Returns each rank's value, in the order of the ranks."""
        return [found] if self.count == 1 else list(gather_object([found]))

    def gather_state(self, tensors: Mapping[str, Tensor], cut: Collection[str] = ()) -> dict[str, Tensor]:
        """Returns whole tensors by name, copied to the main rank's host memory; empty on the others.

        `cut`: the names of those of which each rank holds a piece.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in cut:
                found[name] = self.gather_rows(tensor)
            elif self.is_main:
                found[name] = whole(tensor)
        return found if self.is_main else {}

    def gather_rows(self, piece: Tensor) -> Tensor:
        """Returns the ranks' pieces concatenated, in the main rank's host memory; nothing on the others."""
        rows = torch.zeros(self.count, dtype=torch.int64, device=piece.device)
        rows[self.index] = piece.shape[0]
        counts = self.sum(rows).tolist()
        sent = piece.detach().new_zeros((max(counts), *piece.shape[1:]))
        sent[: piece.shape[0]] = piece.detach()
        parts = [torch.empty_like(sent) for _ in counts] if self.is_main else None
        distributed.gather(sent, parts, dst=0)
        if parts is None:
            return piece.new_empty(0)
        return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])

    def wait(self) -> None:
        """Waits until every rank has reached this call."""
        self.accelerator.wait_for_everyone()


def whole(tensor: Tensor) -> Tensor:
    """Returns a copy in host memory of its own: safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def draw_apart(ranks: Ranks, seed: int) -> None:
    """Gives each rank its own stream of random numbers, so that dropout differs between ranks.

    Rank 0 keeps its stream, so that a run on one device draws the same numbers as without this call.
    """
    if ranks.index:
        torch.manual_seed(seed + 1_000_003 * ranks.index)
